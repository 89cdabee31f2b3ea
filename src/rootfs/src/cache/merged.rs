//! The merged image of several cached layers (see [`crate::merge`]), kept beside them under a key made of theirs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use super::convert::{create, protect};
use super::sidecar::{Part, key_of, key_of_merged};
use super::{Cache, CacheError, Layer, Made, Missing, Outcome, mounted};
use crate::erofs::reader::{Image, ReadAt};
use crate::erofs::writer::Plan;
use crate::merge::{MergeError, merge};
use crate::plan::{Lower, RootfsPlan};

/// From this many layers on one merged image costs the guest less than the layers themselves (`hack/bench layers`).
const WORTH: usize = 2;

impl Cache {
    /// Gives the plan's layers as [`Cache::acquire`] and [`Cache::merge`] do together, at once where the merged image of its
    /// snapshots is there: then nothing of the layers is needed but those that hold data of it.
    pub fn acquire_merged(
        &self,
        plan: &RootfsPlan,
        scratch: &Path,
        threads: usize,
        how: Missing,
    ) -> Result<Vec<Layer>, CacheError> {
        if let Some((merged, count)) = self.stacked(plan) {
            let lowers = plan.lowers[count..].to_vec();
            let above = self.acquire(&RootfsPlan { lowers, ..plan.clone() }, scratch, threads, how)?;
            // One that hides all below it is merged with nothing.
            if !above.iter().any(|layer| layer.opaque) {
                return Ok(std::iter::once(merged).chain(above).collect());
            }
        }
        self.acquire(plan, scratch, threads, how)
    }

    /// The merged image of the snapshots at the bottom of a stack, and how many they are.
    fn stacked(&self, plan: &RootfsPlan) -> Option<(Layer, usize)> {
        let start = Instant::now();
        let snapshot = |lower: &Lower| match lower {
            Lower::Snapshot(dir) if mounted::image(dir).is_none() => key_of(dir).ok(),
            _ => None,
        };
        let keys: Vec<_> = plan.lowers.iter().map_while(snapshot).collect();
        if keys.len() < WORTH {
            return None;
        }
        let merged = self.hit(&key_of_merged(keys.iter().map(String::as_str)), start, false)?;
        let devices = merged.parts.iter().filter(|part| part.device);
        let devices = devices.map(|part| self.hit(&part.key, start, false)).collect::<Option<_>>()?;
        Some((Layer { devices, ..merged }, keys.len()))
    }

    /// Puts one merged image in the place of the cached layers at the bottom of a stack; those that hold data of it become its
    /// devices. Layers that were made for one container or by others stay as they are, and so do few layers. With indexes among them
    /// the merged image is made in `scratch`, for one container.
    pub fn merge(&self, mut layers: Vec<Layer>, scratch: &Path) -> Result<Vec<Layer>, CacheError> {
        let cached = |layer: &Layer| !matches!(layer.outcome, Outcome::Ephemeral | Outcome::Ready);
        let count = layers.iter().take_while(|layer| cached(layer)).count();
        if count < WORTH || layers.iter().any(|layer| !layer.parts.is_empty()) {
            return Ok(layers);
        }
        let above = layers.split_off(count);
        let data: Vec<_> = layers.iter().rev().flat_map(|layer| layer.data.clone()).collect();
        if !data.is_empty() {
            let (start, image) = (Instant::now(), scratch.join("merged.erofs"));
            let Made { opaque, parts, .. } = write_merged(&layers, &image)?;
            let merged = self.ephemeral_layer(&image, opaque, start)?;
            let devices = devices(layers, &parts);
            return Ok(std::iter::once(Layer { devices, data, ..merged }).chain(above).collect());
        }
        let key = key_of_merged(layers.iter().map(|layer| layer.key.as_str()));
        let merged = match self.hit(&key, Instant::now(), false) {
            Some(merged) => merged,
            None => self.build_or_wait(key, format!("{count} layers"), |temp| write_merged(&layers, temp))?,
        };
        let devices = devices(layers, &merged.parts);
        Ok(std::iter::once(Layer { devices, ..merged }).chain(above).collect())
    }
}

/// The layers that hold data of their merged image.
fn devices(layers: Vec<Layer>, parts: &[Part]) -> Vec<Layer> {
    let device = |layer: &Layer| parts.iter().any(|part| part.device && part.key == layer.key);
    layers.into_iter().filter(device).collect()
}

fn write_merged(layers: &[Layer], to: &Path) -> Result<Made, CacheError> {
    let failed = |source| CacheError::Merge { image: to.into(), source };
    let pages: Vec<_> = layers.iter().map(|layer| Pages::new(&layer.file)).collect();
    let images = pages
        .iter()
        .enumerate()
        .map(|(layer, pages)| Image::open(pages).map_err(|source| failed(MergeError::Read { layer, source })));
    let images = images.collect::<Result<Vec<_>, _>>()?;
    let merged = merge(&images).map_err(failed)?;
    let converting = |source| CacheError::Convert { layer: to.into(), source };
    let plan = Plan::merged(&merged).map_err(converting)?;
    let file = create(to)?;
    let written = plan.write_file(&file).map_err(converting)?;
    protect(&file, to)?;
    let part = |(number, layer): (usize, &Layer)| Part {
        key: layer.key.clone(),
        size: layer.size,
        device: merged.layers.contains(&number),
    };
    let parts = layers.iter().enumerate().map(part).collect();
    Ok(Made { file, written, opaque: false, parts })
}

/// Bytes of a page of [`Pages`].
const PAGE: usize = 64 << 10;
/// Pages that are kept of one image.
const KEPT: usize = 8;

/// An image that is read inode by inode: a system call for each would be most of the work.
struct Pages<'f> {
    file: &'f File,
    pages: RefCell<HashMap<u64, Vec<u8>>>,
}

impl<'f> Pages<'f> {
    fn new(file: &'f File) -> Pages<'f> {
        Pages { file, pages: RefCell::default() }
    }
}

impl ReadAt for Pages<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut pages = self.pages.borrow_mut();
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.checked_add(done as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
            let (number, inside) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            if pages.len() >= KEPT && !pages.contains_key(&number) {
                pages.clear();
            }
            let page = match pages.entry(number) {
                std::collections::hash_map::Entry::Occupied(page) => page.into_mut(),
                std::collections::hash_map::Entry::Vacant(place) => place.insert(read_page(self.file, number)?),
            };
            let rest = page.get(inside..).filter(|rest| !rest.is_empty()).ok_or(io::ErrorKind::UnexpectedEof)?;
            let now = rest.len().min(buffer.len() - done);
            buffer[done..done + now].copy_from_slice(&rest[..now]);
            done += now;
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

fn read_page(file: &File, number: u64) -> io::Result<Vec<u8>> {
    let mut page = vec![0; PAGE];
    let mut filled = 0;
    while filled < PAGE {
        match FileExt::read_at(file, &mut page[filled..], number * PAGE as u64 + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    page.truncate(filled);
    Ok(page)
}
