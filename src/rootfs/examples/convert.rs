//! `convert DIRECTORY IMAGE`: what the cache does with one layer, for measuring and for looking at images with other tools.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use nacelle_rootfs::erofs::writer::Plan;
use nacelle_rootfs::{Limits, layer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(directory), Some(image)) = (args.next(), args.next()) else {
        return Err("usage: convert DIRECTORY IMAGE".into());
    };
    let start = Instant::now();
    let tree = layer::scan(Path::new(&directory), &Limits::default())?;
    let scanned = start.elapsed();
    let plan = Plan::new(&tree)?;
    let planned = start.elapsed();
    let written = plan.write(File::create(image)?)?;
    println!("scan {scanned:?}, plan {:?}, write {:?}, {written:?}", planned - scanned, start.elapsed() - planned);
    Ok(())
}
