//! `nacelle layer`: the layer cache of this node, and layer images wherever they are.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context;
use clap::Subcommand;
use nacelle_rootfs::tar::DiffId;
use nacelle_rootfs::{Cache, Limits, Outcome};
use serde_json::json;

use crate::{build, image, units};

/// What to do with layers.
#[derive(Subcommand)]
pub enum Command {
    /// List the cached layers, least recently used first
    Ls {
        /// Print one JSON array instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Read every cached layer in full and check its digest and structure
    Verify {
        /// Remove the broken ones: they are converted anew when they are next needed, and sandboxes that use them keep them
        #[arg(long)]
        repair: bool,
        /// Print one JSON array instead of a line a layer
        #[arg(long)]
        json: bool,
    },
    /// Remove the least recently used layers that no sandbox uses
    Gc {
        /// Keep at most this many bytes; K, M, G and T are binary multiples
        #[arg(long, value_parser = units::parse_bytes)]
        max: u64,
    },
    /// Put a tar archive's image into the cache, under the archive's diffID
    Import {
        /// The archive, plain or compressed with gzip or zstd
        archive: PathBuf,
        /// The digest of its plain bytes (sha256:…); an archive with another is refused
        #[arg(long, value_name = "DIGEST", value_parser = |text: &str| text.parse::<DiffId>())]
        diff_id: DiffId,
    },
    /// Make an EROFS image of a directory or a tar archive
    Build(build::Arguments),
    /// Show what an image, or a file in it, is
    Show(image::Show),
    /// Print the content of a file in an image
    Cat(image::Cat),
    /// Show how the bytes of an image spread over its directories
    Tree(image::Tree),
}

/// Does it; `false` when `verify` found a broken layer and left it.
pub fn run(command: Command, data_dir: &Path, out: &mut impl io::Write) -> anyhow::Result<bool> {
    match command {
        Command::Build(arguments) => build::run(&arguments, out).map(|()| true),
        Command::Show(arguments) => image::show(&arguments, out).map(|()| true),
        Command::Cat(arguments) => image::cat(&arguments, out).map(|()| true),
        Command::Tree(arguments) => image::tree(&arguments, out).map(|()| true),
        Command::Import { archive, diff_id } => import(&open(data_dir)?, &archive, diff_id, out),
        Command::Ls { json } => list(&open(data_dir)?, json, out),
        Command::Verify { repair, json } => verify(&open(data_dir)?, repair, json, out),
        Command::Gc { max } => collect(&open(data_dir)?, max, out),
    }
}

fn open(data_dir: &Path) -> anyhow::Result<Cache> {
    if !data_dir.is_dir() {
        anyhow::bail!("open layer cache: {} is not a directory", data_dir.display());
    }
    Cache::open(data_dir, Limits::default()).context("open layer cache")
}

fn import(cache: &Cache, archive: &Path, diff_id: DiffId, out: &mut impl io::Write) -> anyhow::Result<bool> {
    let layer = cache.acquire_archive(diff_id, || File::open(archive));
    let layer = layer.with_context(|| format!("import {}", archive.display()))?;
    cache.settle([layer.key.as_str()]).context("settle the new image")?;
    let done = if layer.outcome == Outcome::Hit { "in the cache already" } else { "converted" };
    writeln!(out, "{}: {}, {done}", layer.path.display(), units::bytes(layer.size))?;
    Ok(true)
}

fn collect(cache: &Cache, max: u64, out: &mut impl io::Write) -> anyhow::Result<bool> {
    let done = cache.gc(max).context("collect layers")?;
    for key in &done.removed {
        writeln!(out, "removed {key}")?;
    }
    writeln!(out, "freed {}, kept {}", units::bytes(done.freed), units::bytes(done.kept))?;
    Ok(true)
}

fn list(cache: &Cache, json: bool, out: &mut impl io::Write) -> anyhow::Result<bool> {
    let layers = cache.ls().context("list layers")?;
    if json {
        let rows: Vec<_> = layers
            .iter()
            .map(|l| {
                json!({ "key": l.key, "size": l.size, "in_use": l.in_use, "source": l.source,
                        "idle_seconds": idle(l.last_used) })
            })
            .collect();
        serde_json::to_writer_pretty(&mut *out, &rows)?;
        writeln!(out)?;
        return Ok(true);
    }
    writeln!(out, "{:<16} {:>12} {:>8} {:<7} SOURCE", "KEY", "SIZE", "IDLE", "IN USE")?;
    for l in &layers {
        let key: String = l.key.chars().take(16).collect();
        let source = l.source.as_deref().unwrap_or("unknown: its description cannot be read");
        let used = if l.in_use { "yes" } else { "no" };
        writeln!(out, "{key:<16} {:>12} {:>7}s {used:<7} {source}", units::bytes(l.size), idle(l.last_used))?;
    }
    writeln!(out, "{} layers, {}", layers.len(), units::bytes(layers.iter().map(|l| l.size).sum()))?;
    Ok(true)
}

fn verify(cache: &Cache, repair: bool, json: bool, out: &mut impl io::Write) -> anyhow::Result<bool> {
    let verdicts = cache.verify(repair).context("verify layers")?;
    let sound = verdicts.iter().all(|v| v.problem.is_none() || v.removed);
    if json {
        let rows: Vec<_> =
            verdicts.iter().map(|v| json!({ "key": v.key, "problem": v.problem, "removed": v.removed })).collect();
        serde_json::to_writer_pretty(&mut *out, &rows)?;
        writeln!(out)?;
        return Ok(sound);
    }
    for v in &verdicts {
        let removed = if v.removed { ", removed" } else { "" };
        writeln!(out, "{} {}{removed}", v.key, v.problem.as_deref().unwrap_or("ok"))?;
    }
    Ok(sound)
}

fn idle(since: SystemTime) -> u64 {
    SystemTime::now().duration_since(since).unwrap_or_default().as_secs()
}

/// Where the layer cache lives unless the configuration says otherwise.
pub fn default_data_dir() -> PathBuf {
    PathBuf::from("/var/lib/nacelle")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_cache_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let mut out = Vec::new();
        assert!(run(Command::Ls { json: false }, dir.path(), &mut out).unwrap());
        assert!(String::from_utf8(out).unwrap().contains("0 layers, 0 B"));
    }

    #[test]
    fn archives_are_imported_once() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("archive");
        std::fs::write(&archive, [0; 1024]).unwrap();
        let import = |diff_id: &str| {
            let mut out = Vec::new();
            let command = Command::Import { archive: archive.clone(), diff_id: diff_id.parse().unwrap() };
            run(command, dir.path(), &mut out).map(|_| String::from_utf8(out).unwrap())
        };
        let error = format!("{:#}", import(&format!("sha256:{}", "0".repeat(64))).unwrap_err());
        assert!(error.contains("verify archive: diffID is sha256:5f70bf18"), "{error}");
        let right = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef";
        assert!(import(right).unwrap().ends_with("converted\n"));
        assert!(import(right).unwrap().ends_with("in the cache already\n"));
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = run(Command::Ls { json: false }, Path::new("/nonexistent"), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
