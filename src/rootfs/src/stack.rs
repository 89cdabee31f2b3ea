//! What a path means in a stack of lowers, by the rules of overlayfs.
//!
//! ```text
//!  layer   /          /etc              /etc/ssl
//!  3 top   dir        dir               -                  contributes to /etc
//!  2       dir        dir, opaque       dir                contributes, and ends the search below it
//!  1       dir        dir               file               not asked
//! ```
//!
//! Component by component, the layers that still contribute are asked from the top. A directory contributes to what is below it;
//! the first whiteout, non-directory or opaque directory ends the asking. Symbolic links are names like others: they are never
//! followed, so as a parent they are no directory.

use crate::erofs::reader::{Image, Inode, ReadAt, ReadError};

/// Images, bottom first.
pub struct Stack<'a, S: ?Sized> {
    images: Vec<Image<'a, S>>,
}

/// Where a path was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Index of the layer, 0 at the bottom. A merged directory is credited to its topmost layer.
    pub layer: usize,
    /// The inode there.
    pub inode: Inode,
}

impl<'a, S: ReadAt + ?Sized> Stack<'a, S> {
    /// A stack of opened images, bottom first.
    pub fn new(images: Vec<Image<'a, S>>) -> Stack<'a, S> {
        Stack { images }
    }

    /// The image of a layer.
    pub fn image(&self, layer: usize) -> Option<&Image<'a, S>> {
        self.images.get(layer)
    }

    /// The merged root, credited to the topmost layer; `None` without layers.
    pub fn root(&self) -> Result<Option<Found>, ReadError> {
        Ok(self.roots()?.into_iter().next())
    }

    /// Finds a path, given by its components. `None` when it is absent or hidden, and for no components at all.
    pub fn lookup<'p>(&self, path: impl IntoIterator<Item = &'p [u8]>) -> Result<Option<Found>, ReadError> {
        let mut found: Vec<Found> = Vec::new(); // the contributing layers, top first
        for (depth, name) in path.into_iter().enumerate() {
            let parents = if depth == 0 { self.roots()? } else { found };
            found = self.step(parents, name)?;
        }
        Ok(found.into_iter().next())
    }

    fn roots(&self) -> Result<Vec<Found>, ReadError> {
        let mut roots = Vec::with_capacity(self.images.len());
        for (layer, image) in self.images.iter().enumerate().rev() {
            let inode = image.root()?;
            let last = image.is_opaque(&inode)?;
            roots.push(Found { layer, inode });
            if last {
                break;
            }
        }
        Ok(roots)
    }

    fn step(&self, parents: Vec<Found>, name: &[u8]) -> Result<Vec<Found>, ReadError> {
        let mut found: Vec<Found> = Vec::new();
        for Found { layer, inode: parent } in parents {
            let image = &self.images[layer];
            if !parent.is_directory() {
                break;
            }
            let Some(inode) = image.find(&parent, name)? else { continue };
            if inode.is_whiteout() || (!inode.is_directory() && !found.is_empty()) {
                break;
            }
            let last = !inode.is_directory() || image.is_opaque(&inode)?;
            found.push(Found { layer, inode });
            if last {
                break;
            }
        }
        Ok(found)
    }
}
