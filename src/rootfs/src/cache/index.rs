//! Layers that are used before they are converted: an image of names and small files is made at once, and the rest is read in the
//! layer's own directory until the whole image is there.
//!
//! overlayfs looks for the data of such a file by its path, in the directories of all layers, the topmost first. That finds the
//! right one as long as nothing else is below: what is visible under a path is the topmost file of that path. So a stack with
//! such layers is one merged image, and stacks that cannot be merged are converted as ever.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::convert::{Temporary, create, protect};
use super::{Cache, CacheError, Layer, Outcome};
use crate::erofs::writer::Plan;
use crate::layer::{self, refer::refer};
use crate::plan::{Lower, RootfsPlan};
use crate::trace::Step;
use crate::tree::Tree;

/// How layers that the cache does not have are come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// They are converted first.
    Convert,
    /// Those of which at least so many bytes need not be copied at once are indexed.
    Index(u64),
}

impl Missing {
    /// What is possible with these lowers, of which `layers` are there and `missing` are not.
    pub(super) fn possible(self, plan: &RootfsPlan, layers: &[Option<Layer>], missing: &[usize]) -> Missing {
        let cached = layers.iter().flatten().all(|layer| layer.outcome == Outcome::Hit);
        let snapshots = missing.iter().all(|&index| matches!(plan.lowers[index], Lower::Snapshot(_)));
        if cached && snapshots { self } else { Missing::Convert }
    }
}

impl Cache {
    /// An index of the snapshot as the new file `image`, or its whole image in the cache where that is no more work.
    pub(super) fn index_or_build(&self, dir: &Path, image: &Path, worth: u64) -> Result<Layer, CacheError> {
        let start = Instant::now();
        let mut tree = layer::scan(dir, &self.limits)?;
        if !refer(&mut tree, worth) {
            return self.build_snapshot(dir, Some(&tree));
        }
        let step = Step::layer(dir.display());
        let failed = |source| CacheError::Convert { layer: dir.into(), source };
        let plan = Plan::new(&tree).map_err(failed)?;
        let temporary = Temporary(Some(image));
        let file = create(image)?;
        plan.write_file(&file).map_err(failed)?;
        protect(&file, image)?;
        step.count(&tree);
        let layer = self.ephemeral_layer(image, tree.inodes[Tree::ROOT].is_opaque(), start)?;
        temporary.keep();
        Ok(Layer { outcome: Outcome::Indexed, data: vec![dir.into()], ..layer })
    }

    /// Converts what was only indexed, for the next who asks.
    pub fn complete(&self, layers: &[PathBuf]) -> Result<Vec<Layer>, CacheError> {
        layers.iter().map(|dir| self.build_snapshot(dir, None)).collect()
    }
}
