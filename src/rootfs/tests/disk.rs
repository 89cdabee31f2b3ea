//! What disk images refer to, with images that qemu-img makes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use common::run;
use nacelle_rootfs::disk::{ChainError, DEPTH, Format, chain, references};

/// A directory, its path without links.
struct Place {
    path: PathBuf,
    _removed_with_it: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        Place { path, _removed_with_it: dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Runs `qemu-img create` in the directory.
    fn create(&self, arguments: &str) {
        let dir = self.path.to_str().unwrap();
        run("qemu-utils", "sh", &[&"-c", &format!("cd {dir} && exec qemu-img create -q {arguments}")]);
    }

    /// The chain's files by name, when all that is in the directory is allowed.
    fn chain(&self, name: &str, format: Format) -> Result<Vec<String>, ChainError> {
        let members = chain(&self.path(name), format, |path| path.starts_with(&self.path))?;
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        Ok(members.iter().map(|member| format!("{} {}", name(&member.path), member.format)).collect())
    }
}

fn all(error: impl Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text += &format!(": {e}");
        cause = e.source();
    }
    text
}

// E4
#[test]
fn backing_files_and_data_files_are_followed() {
    let place = Place::new();
    place.create("-f raw base.raw 1M");
    place.create("-f qcow2 -b base.raw -F raw middle.qcow2");
    place
        .create(&format!("-f qcow2 -b {}/middle.qcow2 -F qcow2 -o data_file=top.data top.qcow2", place.path.display()));
    let found = references(&place.path("top.qcow2"), Format::Qcow2).unwrap();
    let seen: Vec<_> = found.iter().map(|r| (r.role, &*r.name, r.is_absolute(), r.writable)).collect();
    let middle = place.path("middle.qcow2").display().to_string();
    assert_eq!(seen, [("data file", "top.data", false, true), ("backing file", &middle, true, false)]);
    assert_eq!(found[0].path, place.path("top.data"));
    let names = ["top.qcow2 qcow2", "top.data raw", "middle.qcow2 qcow2", "base.raw raw"];
    assert_eq!(place.chain("top.qcow2", Format::Qcow2).unwrap(), names);
    assert_eq!(place.chain("top.qcow2", Format::Raw).unwrap(), ["top.qcow2 raw"], "raw images have no references");
    assert_eq!(place.chain("base.raw", Format::Raw).unwrap(), ["base.raw raw"]);
    place.create("-f qcow2 -o extended_l2=on features.qcow2 1M");
    let error = all(references(&place.path("features.qcow2"), Format::Qcow2).unwrap_err());
    assert!(
        error.ends_with("features.qcow2 as qcow2: incompatible feature \"extended L2 entries\" is not supported"),
        "{error}"
    );
}

// E4
#[test]
fn old_images_have_no_backing_files() {
    let place = Place::new();
    place.create("-f raw base.raw 1M");
    place.create("-f qcow2 -o compat=0.10 alone.qcow2 1M");
    assert_eq!(place.chain("alone.qcow2", Format::Qcow2).unwrap(), ["alone.qcow2 qcow2"]);
    place.create("-f qcow2 -o compat=0.10 -b base.raw -F raw old.qcow2");
    let error = all(place.chain("old.qcow2", Format::Qcow2).unwrap_err());
    assert!(error.contains("old.qcow2 as qcow2: backing file \"base.raw\" is named without its format"), "{error}");
}

// E4
#[test]
fn protocols_are_refused_by_name() {
    let place = Place::new();
    for name in ["nbd:unix:/run/x", "http://localhost/x", "json:{\"driver\":\"raw\"}", "nbd+unix:///x?socket=/y"] {
        place.create(&format!("-u -f qcow2 -b '{name}' -F raw top.qcow2 1M"));
        let error = all(references(&place.path("top.qcow2"), Format::Qcow2).unwrap_err());
        assert!(
            error.contains(&format!("backing file {name:?} is not the path of a file: it names a protocol")),
            "{error}"
        );
    }
}

// B1
#[test]
fn flat_extents_of_vmdks_are_found() {
    let place = Place::new();
    place.create("-f vmdk -o subformat=monolithicFlat flat.vmdk 1M");
    assert_eq!(place.chain("flat.vmdk", Format::Vmdk).unwrap(), ["flat.vmdk vmdk", "flat-flat.vmdk raw"]);
    place.create("-f vmdk -o subformat=twoGbMaxExtentFlat split.vmdk 5G");
    let names = ["split.vmdk vmdk", "split-f001.vmdk raw", "split-f002.vmdk raw", "split-f003.vmdk raw"];
    assert_eq!(place.chain("split.vmdk", Format::Vmdk).unwrap(), names);
    for (kind, reason) in [
        ("monolithicSparse", "kind of VMDK \"sparse\" is not supported"),
        ("twoGbMaxExtentSparse", "kind of extent \"SPARSE\" is not supported"),
    ] {
        place.create(&format!("-f vmdk -o subformat={kind} other.vmdk 1M"));
        let error = all(place.chain("other.vmdk", Format::Vmdk).unwrap_err());
        assert!(error.ends_with(&format!("other.vmdk as vmdk: {reason}")), "{error}");
    }
    fs::File::create(place.path("long.vmdk")).unwrap().set_len((2 << 20) + 1).unwrap();
    let error = all(place.chain("long.vmdk", Format::Vmdk).unwrap_err());
    assert!(error.contains("descriptor of more than 2 MiB"), "{error}");
}

// E4
#[test]
fn files_outside_of_what_is_allowed_are_refused() {
    let (place, outside) = (Place::new(), Place::new());
    outside.create("-f raw secret 1M");
    let secret = outside.path("secret");
    symlink(&secret, place.path("link")).unwrap();
    for name in ["link", secret.to_str().unwrap()] {
        place.create(&format!("-f qcow2 -b {name} -F raw top.qcow2"));
        let error = all(place.chain("top.qcow2", Format::Qcow2).unwrap_err());
        let top = place.path("top.qcow2");
        let expected =
            format!("disk image {} refers to backing file {}, which is not allowed", top.display(), secret.display());
        assert_eq!(error, expected);
    }
    place.create("-u -f qcow2 -b gone -F raw top.qcow2 1M");
    let error = all(place.chain("top.qcow2", Format::Qcow2).unwrap_err());
    assert!(
        error.starts_with("find backing file \"gone\" of disk image ") && error.contains("No such file"),
        "{error}"
    );
}

// E4
#[test]
fn circles_and_long_chains_are_refused() {
    let place = Place::new();
    place.create("-u -f qcow2 -b b.qcow2 -F qcow2 a.qcow2 1M");
    place.create("-u -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 1M");
    let error = all(place.chain("a.qcow2", Format::Qcow2).unwrap_err());
    assert!(
        error.contains("b.qcow2 refers to backing file") && error.ends_with("in use by the same disk already"),
        "{error}"
    );
    // One file under two names, as two formats.
    place.create("-u -f qcow2 -b twin -F raw c.qcow2 1M");
    fs::hard_link(place.path("c.qcow2"), place.path("twin")).unwrap();
    let error = all(place.chain("c.qcow2", Format::Qcow2).unwrap_err());
    assert!(error.contains("twin, which is in use by the same disk already"), "{error}");
    place.create("-f raw 0 1M");
    for n in 1..=DEPTH + 1 {
        place.create(&format!("-u -f qcow2 -b {} -F {} {n} 1M", n - 1, if n == 1 { "raw" } else { "qcow2" }));
    }
    assert_eq!(place.chain(&DEPTH.to_string(), Format::Qcow2).unwrap().len(), DEPTH + 1);
    let error = all(place.chain(&(DEPTH + 1).to_string(), Format::Qcow2).unwrap_err());
    assert!(error.ends_with("17 stands on more than 16 others"), "{error}");
}

#[test]
fn only_files_and_block_devices_are_opened() {
    let place = Place::new();
    rustix::fs::mknodat(rustix::fs::CWD, place.path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for name in ["fifo", ".", "/dev/null"] {
        let error = all(references(&place.path(name), Format::Qcow2).unwrap_err());
        assert!(error.ends_with("it is neither a regular file nor a block device"), "{error}");
    }
    let error = all(references(&place.path("gone"), Format::Raw).unwrap_err());
    assert!(error.starts_with("open disk image ") && error.contains("gone: No such file"), "{error}");
}

/// A relative name is looked for beside the path that was opened, as the VMM does, and not beside what a link leads to.
#[test]
fn names_are_relative_to_the_path_that_was_opened() {
    let place = Place::new();
    for (dir, base) in [("real", "other.raw"), ("here", "base.raw")] {
        fs::create_dir(place.path(dir)).unwrap();
        place.create(&format!("-f raw {dir}/{base} 1M"));
    }
    place.create("-u -f qcow2 -b base.raw -F raw real/top.qcow2 1M");
    symlink("../real/top.qcow2", place.path("here/top.qcow2")).unwrap();
    assert_eq!(place.chain("here/top.qcow2", Format::Qcow2).unwrap(), ["top.qcow2 qcow2", "base.raw raw"]);
    assert!(place.chain("real/top.qcow2", Format::Qcow2).is_err());
}
