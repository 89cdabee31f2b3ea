//! `nacelle layer build`: a directory or a tar archive → an EROFS image.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use nacelle_rootfs::erofs::reader::{Image, checksum};
use nacelle_rootfs::erofs::writer::{Plan, Written};
use nacelle_rootfs::tar::{self, DiffId, Hashing};
use nacelle_rootfs::tree::Tree;
use nacelle_rootfs::{Limits, layer};
use serde_json::json;

use crate::{progress, units};

/// What to build from, and where to.
#[derive(clap::Args)]
pub struct Arguments {
    /// Directory to build from
    #[arg(required_unless_present = "tar")]
    directory: Option<PathBuf>,
    /// Build from this archive, plain or compressed with gzip or zstd; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "directory")]
    tar: Option<PathBuf>,
    /// The image to write; it appears when it is complete
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Print the digest of the archive's plain bytes, or refuse an archive that has another than the one given (sha256:…)
    #[arg(long, requires = "tar", num_args = 0..=1, value_name = "DIGEST", value_parser = |text: &str| text.parse::<DiffId>())]
    diff_id: Option<Option<DiffId>>,
    /// Leave the data of large files where it is: the image is of use only beside the directory, as a first pod has it
    #[arg(long, conflicts_with = "tar")]
    index: bool,
    /// Read the image back in full and check its checksum, structure and link counts
    #[arg(long)]
    verify: bool,
    /// Print one JSON object instead of a sentence
    #[arg(long)]
    json: bool,
}

/// Builds it.
pub fn run(arguments: &Arguments, out: &mut impl io::Write) -> anyhow::Result<()> {
    let output = &arguments.output;
    let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Before the image is there: it may be meant to lie in the very directory.
    let mut tree = arguments.directory.as_ref().map(|dir| layer::scan(dir, &Limits::default())).transpose()?;
    if let Some(tree) = tree.as_mut().filter(|_| arguments.index) {
        layer::refer::refer(tree, 0);
    }
    // Readable for its owner alone, as the files in it may be.
    let image = tempfile::NamedTempFile::new_in(dir).with_context(|| format!("create image in {}", dir.display()))?;
    let hashing = arguments.diff_id.map_or(Hashing::Skip, |wanted| wanted.map_or(Hashing::Compute, Hashing::Expect));
    let (written, diff_id) = match (&arguments.tar, tree) {
        (Some(archive), _) => from_archive(archive, image.as_file(), hashing)
            .with_context(|| format!("convert archive {}", archive.display()))?,
        (_, Some(tree)) => (from_tree(&tree, image.as_file())?, None),
        _ => anyhow::bail!("build image: neither a directory nor an archive was given"),
    };
    if arguments.verify {
        verify(image.as_file(), &written).context("verify image")?;
    }
    image.as_file().sync_all().context("sync image")?;
    image.persist(output).with_context(|| format!("publish image {}", output.display()))?;
    if arguments.json {
        let report = json!({
            "image": output.display().to_string(), "size": written.size, "inodes": written.inodes,
            "shared": written.shared,
            "checksum": written.checksum.map(|checksum| format!("crc32c:{checksum:08x}")),
            "diff_id": diff_id.map(|id| id.to_string()), "verified": arguments.verify,
        });
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    let verified = if arguments.verify { ", verified" } else { "" };
    writeln!(out, "{}: {}, {} inodes{verified}", output.display(), units::bytes(written.size), written.inodes)?;
    if let Some(id) = diff_id {
        writeln!(out, "diffID {id}")?;
    }
    Ok(())
}

fn from_tree(tree: &Tree, image: &File) -> anyhow::Result<Written> {
    let plan = Plan::new(tree)?;
    let bar = progress::bar("writing", Some(plan.size()));
    // A bar shows what passes through this process, which blocks that are shared do not.
    let written = match bar.is_hidden() {
        true => plan.write_file(image),
        false => plan.write(bar.wrap_write(image)),
    }?;
    bar.finish_and_clear();
    Ok(written)
}

fn from_archive(path: &Path, image: &File, hashing: Hashing) -> anyhow::Result<(Written, Option<DiffId>)> {
    let limits = Limits::default();
    let converted = if path.as_os_str() == "-" {
        let bar = progress::bar("converting", None);
        let converted = tar::convert(bar.wrap_read(io::stdin()), image, &limits, hashing)?;
        bar.finish_and_clear();
        converted
    } else {
        let file = File::open(path).context("open it")?;
        let size = file.metadata().context("stat it")?.len();
        let bar = progress::bar("converting", Some(size));
        // A bar shows what passes through this process, which would be slower for nobody to look at.
        let converted = match bar.is_hidden() {
            true => tar::convert_file(&file, image, &limits, hashing),
            false => tar::convert(bar.wrap_read(file), image, &limits, hashing),
        }?;
        bar.finish_and_clear();
        converted
    };
    Ok((converted.written, converted.diff_id))
}

/// Reads the image as a stranger would.
fn verify(file: &File, written: &Written) -> anyhow::Result<()> {
    let found = checksum(file).context("read it back")?;
    if let Some(written) = written.checksum {
        ensure!(found == written, "checksum is {found:08x}, not {written:08x} as written");
    }
    let totals = Image::open(file).and_then(|image| image.check())?;
    ensure!(totals.inodes == written.inodes, "it has {} inodes, not {} as written", totals.inodes, written.inodes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn run_with(words: &[&str]) -> anyhow::Result<String> {
        let arguments = Command::try_parse_from([&["build"], words].concat())?.arguments;
        let mut out = Vec::new();
        run(&arguments, &mut out)?;
        Ok(String::from_utf8(out)?)
    }

    #[test]
    fn a_directory_becomes_an_image() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "content").unwrap();
        let image = dir.path().join("image.erofs");
        let (source, image) = (dir.path().to_str().unwrap(), image.to_str().unwrap());
        let said = run_with(&[source, "-o", image, "--verify"]).unwrap();
        assert!(said.ends_with("8.0 KiB, 2 inodes, verified\n"), "{said}");
        fs::write(dir.path().join("large"), vec![1; 5 << 20]).unwrap();
        let said = run_with(&[source, "-o", image, "--verify", "--index"]).unwrap();
        assert!(said.ends_with("16.0 KiB, 4 inodes, verified\n"), "the large file is not in it: {said}");
        fs::remove_file(dir.path().join("large")).unwrap();
        let said = run_with(&[source, "-o", image, "--json"]).unwrap();
        assert!(said.contains("\"inodes\": 3"), "the image itself lies there now: {said}");
    }

    #[test]
    fn what_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("archive");
        fs::write(&archive, [0; 1024]).unwrap();
        let (archive, image) = (archive.to_str().unwrap(), dir.path().join("image"));
        let wrong = format!("sha256:{}", "0".repeat(64));
        let words = ["--tar", archive, "-o", image.to_str().unwrap()];
        let error = run_with(&[&words[..], &["--diff-id", &wrong]].concat()).unwrap_err();
        assert!(format!("{error:#}").contains("verify archive: diffID is sha256:5f70bf18"), "{error:#}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(!run_with(&words).unwrap().contains("diffID"));
        assert!(run_with(&[&words[..], &["--diff-id"]].concat()).unwrap().contains("diffID sha256:5f70bf18"));
        for words in [&["-o", "x"][..], &["d", "--tar", "t", "-o", "x"], &["d", "-o", "x", "--diff-id", &wrong]] {
            assert!(run_with(words).is_err(), "{words:?}");
        }
    }
}
