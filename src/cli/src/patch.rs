//! `nacelle patch`: check a list of patches without a container, or build the lower that they come to.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nacelle_rootfs::Limits;
use nacelle_rootfs::patch::{self, Change, LowerImage, Patch, Sources};

use crate::units;

/// What to do with patches.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Read a JSON list of patches and say what is wrong with it
    Check {
        /// The list
        patches: PathBuf,
    },
    /// Build the EROFS image that goes on top of the layers
    Apply {
        /// The list
        patches: PathBuf,
        /// A layer's image; given several times, the lowest first
        #[arg(long, value_name = "IMAGE")]
        lower: Vec<PathBuf>,
        /// Where copies may come from; given several times
        #[arg(long, value_name = "DIR")]
        source: Vec<PathBuf>,
        /// The image to write; it appears when it is complete
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
}

/// Does it.
pub fn run(command: &Command, out: &mut impl io::Write) -> anyhow::Result<()> {
    match command {
        Command::Check { patches } => {
            let list = read(patches)?;
            for (index, patch) in list.iter().enumerate() {
                let path = units::name(patch.path().to_string().as_bytes());
                writeln!(out, "{index:>4} {:<10} {path}", kind(patch))?;
            }
            writeln!(out, "{} patches, all well-formed", list.len())?;
        }
        Command::Apply { patches, lower, source, output } => {
            let list = read(patches)?;
            let lowers = lower.iter().map(|path| LowerImage::open(path)).collect::<Result<Vec<_>, _>>()?;
            let sources = Sources::below(source.iter().cloned());
            match patch::build(&list, &lowers, &sources, &Limits::default(), output)? {
                None => writeln!(out, "no patches: no image is needed")?,
                Some(written) => {
                    writeln!(out, "{}: {} patches, {}", output.display(), list.len(), units::bytes(written.size))?;
                }
            }
        }
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<Patch>> {
    let json = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(patch::decode(&json, &Limits::default())?)
}

fn kind(patch: &Patch) -> &'static str {
    match patch.change {
        Change::Write { .. } => "write",
        Change::CopyFile { .. } => "copy-file",
        Change::CopyDir { .. } => "copy-dir",
        Change::Symlink { .. } => "symlink",
        Change::Mkdir { .. } => "mkdir",
        Change::Remove { .. } => "remove",
        Change::Append { .. } => "append",
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use nacelle_rootfs::erofs::reader::Image;
    use nacelle_rootfs::erofs::writer::Plan;
    use nacelle_rootfs::layer;

    use super::*;

    #[test]
    fn lists_are_checked_and_built() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("layer")).unwrap();
        fs::write(at("layer/motd"), "welcome\n").unwrap();
        let tree = layer::scan(&at("layer"), &Limits::default()).unwrap();
        Plan::new(&tree).unwrap().write(File::create(at("lower")).unwrap()).unwrap();
        let said = |command| {
            let mut out = Vec::new();
            run(&command, &mut out).map(|()| String::from_utf8(out).unwrap())
        };
        let apply = || Command::Apply {
            patches: at("list"),
            lower: vec![at("lower")],
            source: Vec::new(),
            output: at("image"),
        };
        fs::write(at("list"), r#"[{"kind":"append","path":"/motd","content":"stranger\n"}]"#).unwrap();
        assert!(said(Command::Check { patches: at("list") }).unwrap().contains("append     /motd\n1 patches"));
        assert!(said(apply()).unwrap().contains("1 patches, 8.0 KiB"));
        let file = File::open(at("image")).unwrap();
        let image = Image::open(&file).unwrap();
        assert_eq!(image.lookup(b"/motd").unwrap().size, 17);

        fs::write(at("list"), r#"[{"kind":"text","path":"/motd","content":""}]"#).unwrap();
        let error = format!("{:#}", said(apply()).unwrap_err());
        assert!(error.contains("apply patch 0 to /motd: layer ") && error.contains("set \"replace\""), "{error}");
        fs::write(at("list"), r#"[{"kind":"text","path":"motd","content":""}]"#).unwrap();
        let error = format!("{:#}", said(Command::Check { patches: at("list") }).unwrap_err());
        assert!(error.contains("decode patch 0: path \"motd\": it must be absolute"), "{error}");
    }
}
