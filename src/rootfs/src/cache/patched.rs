//! Patches over the layers of one container, as one more lower on top of them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use super::convert::Temporary;
use super::{Cache, CacheError, Layer, failed};
use crate::patch::{self, LowerImage, Patch, PatchError, Sources};

impl Cache {
    /// Builds the image of `patches` over `layers` (bottom first) at `image`, a file of the caller's; `None` for no patches. Nothing of
    /// the layers is changed.
    pub fn patch(
        &self,
        layers: &[Layer],
        patches: &[Patch],
        sources: &Sources,
        image: &Path,
    ) -> Result<Option<Layer>, CacheError> {
        let start = Instant::now();
        let open = |layer: &Layer| {
            let failed = |source| PatchError::Open { layer: layer.key.clone(), source };
            Ok(LowerImage { name: layer.key.clone(), file: layer.file.try_clone().map_err(failed)? })
        };
        let lowers = layers.iter().map(open).collect::<Result<Vec<_>, PatchError>>()?;
        if patch::build(patches, &lowers, sources, &self.limits, image)?.is_none() {
            return Ok(None);
        }
        let temporary = Temporary(Some(image));
        fs::set_permissions(image, fs::Permissions::from_mode(0o444)).map_err(failed("protect image", image))?;
        let layer = self.ephemeral_layer(image, false, start)?;
        temporary.keep();
        Ok(Some(layer))
    }
}
