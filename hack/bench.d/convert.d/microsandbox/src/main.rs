//! What microsandbox does with a layer and for a container's disk, as commands:
//!
//! `convert-peer layer none|gzip|zstd TAR OUT` makes an EROFS image of an archive, and hashes the archive, as its pull does;
//! `convert-peer upper OUT BYTES` makes an empty ext4 disk; `convert-peer nothing` is what a process alone costs.

use std::path::Path;

use microsandbox_image::ext4::{Ext4FormatOptions, format_ext4};
use microsandbox_image::tar::{Compression, ingest_compressed_tar};
use microsandbox_image::{erofs::write_erofs, tree::ResourceLimits};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["layer", kind, tar, out] => {
            let compression = match *kind {
                "gzip" => Compression::Gzip,
                "zstd" => Compression::Zstd,
                _ => Compression::None,
            };
            tokio::runtime::Runtime::new()?.block_on(async {
                let reader = tokio::fs::File::open(tar).await?;
                // Large files wait there and not in memory.
                let spool = format!("{out}.spool");
                let limits = ResourceLimits::default();
                let made = ingest_compressed_tar(reader, compression, &limits, Some(Path::new(&spool))).await?;
                write_erofs(&made.tree, Path::new(out))?;
                std::fs::remove_file(&spool)?;
                Ok(())
            })
        }
        ["upper", out, bytes] => {
            let options = Ext4FormatOptions { size_bytes: bytes.parse()?, ..Ext4FormatOptions::default() };
            Ok(format_ext4(Path::new(out), &options)?)
        }
        ["nothing"] => Ok(()),
        _ => Err("usage: convert-peer layer KIND TAR OUT | upper OUT BYTES | nothing".into()),
    }
}
