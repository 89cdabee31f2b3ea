//! The architecture as tests: the arrows between the crates, where tokio may be used, where `unsafe` may be written,
//! and how long a file may grow. `ARCHITECTURE.md` has the reasons.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Crate (folder under `src/`) and the crates of ours it may depend on. There are no other arrows.
const ARROWS: &[(&str, &[&str])] = &[
    ("agent", &["protocol"]),
    ("cli", &["protocol", "rootfs"]),
    ("protocol", &[]),
    ("rootfs", &[]),
    ("shim", &["protocol", "rootfs"]),
    ("vmm", &["protocol"]),
];

/// Crates that may use tokio.
const ASYNC: &[&str] = &["agent", "shim"];

/// Only these files may contain `unsafe`.
const UNSAFE_ROOMS: &[&str] = &["agent/src/quota.rs", "agent/src/verity.rs", "vmm/src/jail.rs", "vmm/src/krun.rs"];

/// Lines of a source file above which it is refused, inline tests not counted.
const MAX_LINES: usize = 800;

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../src")
}

fn manifest(name: &str) -> toml::Table {
    let path = src().join(name).join("Cargo.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    text.parse().unwrap_or_else(|e| panic!("parse {}: {e}", path.display()))
}

/// Names in every `[dependencies]`-like table of a manifest, those of single targets included.
fn dependencies(table: &toml::Table, with_dev: bool) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (key, value) in table {
        let Some(inner) = value.as_table() else { continue };
        match key.as_str() {
            "dependencies" => names.extend(inner.keys().cloned()),
            "dev-dependencies" | "build-dependencies" if with_dev => names.extend(inner.keys().cloned()),
            "target" => inner.values().filter_map(|t| t.as_table()).for_each(|t| {
                names.extend(dependencies(t, with_dev));
            }),
            _ => {}
        }
    }
    names
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("list {}: {e}", dir.display())) {
        let path = entry.expect("read a directory entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Source files by their path below `src/`.
fn sources() -> BTreeMap<String, String> {
    let root = src();
    let mut files = Vec::new();
    rust_files(&root, &mut files);
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).expect("files lie below the root").display().to_string();
            let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {name}: {e}"));
            (name, text)
        })
        .collect()
}

/// The code of a line: what stands before a comment, and no text in quotes.
fn code(line: &str) -> String {
    let line = line.split("//").next().unwrap_or_default();
    line.split('"').step_by(2).collect::<Vec<_>>().join(" ")
}

#[test]
fn crates_depend_along_the_arrows_only() {
    let folders: BTreeSet<String> = fs::read_dir(src())
        .expect("list src")
        .map(|e| e.expect("read a directory entry").file_name().into_string().expect("crate folders have plain names"))
        .collect();
    let known: BTreeSet<String> = ARROWS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(folders, known, "the crates under src/ are those of ARCHITECTURE.md");
    for (name, allowed) in ARROWS {
        let ours: BTreeSet<String> = dependencies(&manifest(name), true)
            .iter()
            .filter_map(|d| d.strip_prefix("nacelle-").map(str::to_owned))
            .collect();
        let allowed: BTreeSet<String> = allowed.iter().map(|a| (*a).to_owned()).collect();
        let excess: Vec<_> = ours.difference(&allowed).collect();
        assert!(excess.is_empty(), "src/{name} must not depend on {excess:?}");
    }
}

#[test]
fn only_shim_and_agent_use_tokio() {
    for (name, _) in ARROWS {
        let async_deps: Vec<String> =
            dependencies(&manifest(name), false).into_iter().filter(|d| d.starts_with("tokio")).collect();
        assert!(ASYNC.contains(name) || async_deps.is_empty(), "src/{name} must not depend on {async_deps:?}");
    }
}

#[test]
fn libkrun_is_linked_into_the_vmm_alone() {
    for (name, _) in ARROWS {
        let krun = dependencies(&manifest(name), true).iter().any(|d| d.contains("krun"));
        assert!(!krun || *name == "vmm", "src/{name} must not depend on libkrun");
    }
}

#[test]
fn unsafe_is_written_in_its_rooms_only() {
    for (name, text) in sources() {
        if UNSAFE_ROOMS.contains(&name.as_str()) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let words: Vec<String> =
                code(line).split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned).collect();
            assert!(!words.iter().any(|w| w == "unsafe"), "src/{name}:{}: unsafe outside its rooms", number + 1);
            let lifts = words.iter().any(|w| w == "allow" || w == "expect") && words.iter().any(|w| w == "unsafe_code");
            assert!(!lifts, "src/{name}:{}: lifts the lint on unsafe code", number + 1);
        }
    }
}

/// Tests can leave steps of the jail out, and only where debug assertions are on (src/vmm/src/jail/step.rs).
#[test]
fn a_release_has_no_way_to_leave_out_a_step_of_the_jail() {
    let path = src().join("../Cargo.toml");
    let workspace: toml::Table = fs::read_to_string(path).expect("read Cargo.toml").parse().expect("parse Cargo.toml");
    let release = workspace["profile"]["release"].as_table().expect("a table");
    assert!(!release.contains_key("debug-assertions"));
    let packages = release.get("package").and_then(toml::Value::as_table).into_iter().flatten();
    for (name, settings) in packages {
        assert!(settings.get("debug-assertions").is_none(), "{name}");
    }
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    for (name, _) in ARROWS {
        let inherits = manifest(name)
            .get("lints")
            .and_then(|l| l.get("workspace"))
            .and_then(toml::Value::as_bool)
            .unwrap_or_default();
        assert!(inherits, "src/{name}/Cargo.toml: [lints] workspace = true is missing");
    }
}

#[test]
fn files_stay_short_enough_to_read() {
    for (name, text) in sources() {
        let lines = text.lines().take_while(|l| l.trim() != "#[cfg(test)]").count();
        assert!(lines <= MAX_LINES, "src/{name} has {lines} lines before its tests; at most {MAX_LINES}");
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    for (name, text) in sources() {
        assert!(text.starts_with("//!"), "src/{name} does not open with a `//!` comment");
    }
}
