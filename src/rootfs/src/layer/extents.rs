//! Which parts of a sparse file hold data.

use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::{SeekFrom, Statx};
use rustix::io::Errno;

use crate::tree::open_file;

/// The parts of a file that hold data; `None` when it looks dense. More than `max` parts are merged into fewer, larger ones.
pub fn extents(dir: &OwnedFd, name: &[u8], stat: &Statx, max: usize) -> rustix::io::Result<Option<Vec<Range<u64>>>> {
    const COARSEST: u64 = 1 << 40;
    if stat.stx_blocks * 512 >= stat.stx_size {
        return Ok(None);
    }
    let file = open_file(dir, name).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut granule = 4096;
    let mut at = 0;
    while at < stat.stx_size {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return Ok(None), // no notion of holes here
            Err(e) => return Err(e),
        };
        at = rustix::fs::seek(&file, SeekFrom::Hole(start))?;
        push_extent(&mut extents, start, at, granule);
        while extents.len() > max {
            if granule == COARSEST {
                return Ok(None);
            }
            granule *= 16;
            for extent in std::mem::take(&mut extents) {
                push_extent(&mut extents, extent.start, extent.end, granule);
            }
        }
    }
    if let Some(last) = extents.last_mut() {
        last.end = last.end.min(stat.stx_size);
    }
    let dense = extents.len() == 1 && extents[0] == (0..stat.stx_size);
    Ok((!dense).then_some(extents))
}

fn push_extent(extents: &mut Vec<Range<u64>>, start: u64, end: u64, granule: u64) {
    let (start, end) = (start / granule * granule, end.next_multiple_of(granule));
    match extents.last_mut() {
        Some(last) if last.end >= start => last.end = last.end.max(end),
        _ => extents.push(start..end),
    }
}
