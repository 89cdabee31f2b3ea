//! Roots and volumes that a bundle has no words for: what a pod's annotations and mounts of nacelle's own types ask for.
//!
//! ```text
//!  io.nacelle.rootfs, .format, .fstype, .upper-size ──► a directory or a disk in the place of the image
//!  io.nacelle.volumes (JSON)  ─┐
//!  mounts nacelle.disk, .named ┴──► disk     ──► a device of the VM, mounted once in the guest, bound into each container
//!                                   named    ──► a directory that nacelle keeps: a volume like any other
//!                                   bind     ──► the same, of a directory of the host's
//!                                   tmpfs    ──► the guest's memory
//! ```
//!
//! Who writes annotations may create pods and no more: every path of the host that they name is judged by
//! `annotations.host_paths`. Who can put mounts into a bundle is containerd's own client, root of the node.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nacelle_protocol::agent::{DISKS_DIR, VOLUMES_DIR};
use nacelle_protocol::ids::ContainerId;
use nacelle_rootfs::disk::Format;
use nacelle_rootfs::plan::{self, Mount, PlanError};
use nacelle_rootfs::source::{Request, Source, SourceError};
use nacelle_rootfs::volume::store::{Store, StoreError};
use nacelle_rootfs::volume::{Kind, Volume, decode, is_ours, of_mount};
use serde_json::json;
use thiserror::Error;

use crate::annotations::{AnnotationError, Policy, ROOTFS, ROOTFS_FSTYPE, VOLUMES, Wishes, refuse};
use crate::bundle::Bundle;
use crate::config::{Config, Fallback};
use crate::disks::{DiskError, Disks, Wanted};
use crate::mounted::{Root, of_directory};
use crate::patches::Patches;
use crate::spec::{self, Translation};

#[cfg(test)]
mod tests;

/// Annotation: the image that containerd has made a container's snapshot of.
const IMAGE: &str = "io.kubernetes.cri.image-name";

/// Why a root or a volume cannot be had.
#[derive(Debug, Error)]
pub enum SourcesError {
    /// An annotation.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// Mounts of the bundle.
    #[error("read mounts: {0}")]
    Mount(String),
    /// The root's mounts.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A named volume.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What a container asks for.
#[derive(Debug)]
pub struct Sources {
    root: Option<Given>,
    /// First those that stand for mounts of the bundle, in their order.
    volumes: Vec<Extra>,
}

/// A root of an annotation's.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Given {
    Directory(PathBuf),
    Disk(Wanted),
}

#[derive(Debug)]
struct Extra {
    volume: Volume,
    what: What,
    /// It stands for a mount of the bundle.
    mount: bool,
}

#[derive(Debug)]
enum What {
    Directory(PathBuf, Option<Arc<File>>),
    Memory,
    Disk(Wanted),
}

impl Sources {
    /// Reads and judges all of it. Named volumes are held from now on. Blocks.
    ///
    /// # Errors
    /// [`SourcesError`] names the annotation or the mount, and the rule.
    pub fn read(bundle: &Bundle, wishes: &Wishes, config: &Config) -> Result<Self, SourcesError> {
        let root = given_root(bundle, wishes, config)?;
        let mut volumes = Vec::new();
        for mount in bundle.spec.mounts().iter().flatten() {
            let kind = mount.typ().as_deref().unwrap_or_default();
            if !is_ours(kind) {
                continue;
            }
            let text = |path: Option<&Path>| path.map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
            let (source, destination) = (text(mount.source().as_deref()), text(Some(mount.destination())));
            let options = mount.options().clone().unwrap_or_default();
            let read = of_mount(kind, &source, &destination, &options);
            let (volume, warnings) = read.map_err(|errors| SourcesError::Mount(all(&errors)))?;
            warnings.iter().for_each(|warning| tracing::warn!("mounts: {warning}"));
            // A path of the node's owner, who may use links.
            let host = |path: &Path| {
                let real = path.canonicalize();
                real.map_err(|e| SourcesError::Mount(format!("find {} for {destination}: {e}", path.display())))
            };
            let what = What::of(&volume, config, true, host)?;
            volumes.push(Extra { volume, what, mount: true });
        }
        if let Some(list) = &wishes.volumes {
            let decoded = decode(list.as_bytes()).map_err(|errors| refuse(VOLUMES, list, all(&errors)))?;
            decoded.warnings.iter().for_each(|warning| tracing::warn!("{VOLUMES}: {warning}"));
            for volume in decoded.volumes {
                let taken = |mount: &oci_spec::runtime::Mount| {
                    // Compared as paths, so that a slash more is none.
                    mount.destination().components().eq(Path::new(&volume.guest.to_string()).components())
                };
                if bundle.spec.mounts().iter().flatten().any(taken) {
                    let reason = format!("the container has a mount at {} already", volume.guest);
                    return Err(refuse(VOLUMES, list, reason).into());
                }
                let host = |path: &Path| Ok(named_path(&config.annotations, VOLUMES, path)?);
                let what = What::of(&volume, config, false, host)?;
                volumes.push(Extra { volume, what, mount: false });
            }
        }
        Ok(Self { root, volumes })
    }

    /// The root file system: what an annotation says, or what the mounts are. A disk of a snapshotter's becomes one of
    /// the VM where that is possible: the container is `alone`, so it brings its VM with it, and nobody has patches for it.
    ///
    /// # Errors
    /// [`SourcesError`]
    pub fn root(
        &self,
        mounts: &[Mount],
        patches: &Patches,
        config: &Config,
        alone: bool,
    ) -> Result<Root, SourcesError> {
        match &self.root {
            Some(Given::Directory(dir)) => return Ok(Root::Layers(of_directory(dir.clone()))),
            Some(Given::Disk(wanted)) if patches.is_empty() => return Ok(Root::Disk(wanted.clone())),
            Some(Given::Disk(wanted)) => {
                let reason = "patches and a root that is a disk do not go together: a disk is used as it is";
                return Err(refuse(ROOTFS, &wanted.path.to_string_lossy(), reason).into());
            }
            None => {}
        }
        let there = |path: &Path| path.metadata().is_ok_and(|m| m.is_file() || m.file_type().is_block_device());
        let disk = plan::disk(mounts).filter(|disk| alone && patches.is_empty() && there(&disk.path));
        if let Some(disk) = disk {
            let path = disk.path.canonicalize().unwrap_or(disk.path);
            let (format, types) = (Format::Raw, vec![disk.kind]);
            return Ok(Root::Disk(Wanted { path, format, types, read_only: disk.read_only, beside: false }));
        }
        Ok(Root::of(mounts, config.fallback == Fallback::Flatten)?)
    }

    /// All disks that are needed, with that of `root`.
    pub fn disks(&self, root: Option<&Root>) -> Vec<Wanted> {
        let root = match (root, &self.root) {
            (Some(Root::Disk(wanted)), _) => Some(wanted),
            // A sandbox has no root, but its containers will.
            (None, Some(Given::Disk(wanted))) => Some(wanted),
            _ => None,
        };
        let volumes = self.volumes.iter().filter_map(|extra| match &extra.what {
            What::Disk(wanted) => Some(wanted),
            What::Directory(..) | What::Memory => None,
        });
        root.into_iter().chain(volumes).cloned().collect()
    }

    /// Writes the volumes into a container's configuration. Returns what has to be held as long as the container is there.
    ///
    /// # Errors
    /// [`DiskError::Late`] for a disk that the VM does not have.
    pub fn place(
        self,
        id: &ContainerId,
        translation: &mut Translation,
        disks: &Disks,
    ) -> Result<Vec<Arc<File>>, DiskError> {
        let mut holds = Vec::new();
        let mut places = Vec::new();
        for extra in self.volumes {
            let destination = PathBuf::from(extra.volume.guest.to_string());
            let (kind, source, mut options) = match extra.what {
                What::Memory => {
                    let size = match extra.volume.kind {
                        Kind::Tmpfs { size_mib: Some(mib) } => Some(format!("size={mib}m")),
                        _ => None,
                    };
                    ("tmpfs", "tmpfs".into(), size.into_iter().collect::<Vec<_>>())
                }
                What::Directory(source, hold) => {
                    holds.extend(hold);
                    let name = format!("{id}-{}{}", translation.volumes.len(), translation.suffix());
                    let place = Path::new(VOLUMES_DIR).join(&name);
                    translation.volumes.push(spec::Volume {
                        name,
                        source,
                        destination: destination.clone(),
                        recursive: true,
                        read_only: extra.volume.readonly,
                        follows: false,
                    });
                    ("bind", place, vec!["rbind".to_owned(), "rprivate".to_owned()])
                }
                What::Disk(wanted) => {
                    let disk = disks.find(&wanted)?;
                    let place = Path::new(DISKS_DIR).join(&disk.serial);
                    // Twice in one container is one disk.
                    if !translation.disks.iter().any(|known| known.serial == disk.serial) {
                        translation.disks.push(disk);
                    }
                    ("bind", place, vec!["bind".to_owned(), "rprivate".to_owned()])
                }
            };
            // Whatever the container asks for, there is no way to more rights on a volume, and no device.
            options.extend(["nosuid", "nodev", if extra.volume.readonly { "ro" } else { "rw" }].map(str::to_owned));
            options.extend(extra.volume.noexec.then(|| "noexec".to_owned()));
            let mount = json!({ "destination": destination, "type": kind, "source": source, "options": options });
            places.push((mount, extra.mount));
        }
        translation.put(places);
        Ok(holds)
    }
}

impl What {
    fn of(
        volume: &Volume,
        config: &Config,
        beside: bool,
        host: impl Fn(&Path) -> Result<PathBuf, SourcesError>,
    ) -> Result<Self, SourcesError> {
        Ok(match &volume.kind {
            Kind::Bind { host: path, .. } => Self::Directory(host(path)?, None),
            Kind::Named { name, .. } => {
                let (data, lock) = Store::new(&config.data_dir).hold(name)?;
                Self::Directory(data, Some(Arc::new(lock)))
            }
            Kind::Tmpfs { .. } => Self::Memory,
            Kind::Disk { host: path, format, fstype } => {
                let types = types(config, fstype.as_deref()).map_err(|reason| match beside {
                    true => SourcesError::Mount(format!("mount at {}: {reason}", volume.guest)),
                    false => refuse(VOLUMES, fstype.as_deref().unwrap_or_default(), reason).into(),
                })?;
                Self::Disk(Wanted { path: host(path)?, format: *format, types, read_only: volume.readonly, beside })
            }
        })
    }
}

/// The types of file systems to try.
fn types(config: &Config, wish: Option<&str>) -> Result<Vec<String>, String> {
    let Some(wish) = wish else { return Ok(config.filesystems.clone()) };
    if config.filesystems.iter().any(|known| known == wish) {
        return Ok(vec![wish.to_owned()]);
    }
    Err(format!("file system {wish:?} is not one of volumes.filesystems: {}", config.filesystems.join(", ")))
}

fn all(errors: &[impl ToString]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// A path of the host that an annotation names, with every link followed.
fn named_path(policy: &Policy, name: &'static str, path: &Path) -> Result<PathBuf, AnnotationError> {
    let text = path.to_str().ok_or_else(|| refuse(name, &path.to_string_lossy(), "it is not UTF-8"))?;
    policy.host_path(name, text)
}

/// The root that annotations ask for.
fn given_root(bundle: &Bundle, wishes: &Wishes, config: &Config) -> Result<Option<Given>, SourcesError> {
    let wrong = |errors: Vec<SourceError>| refuse(ROOTFS, wishes.rootfs.as_deref().unwrap_or_default(), all(&errors));
    let request = Request {
        rootfs: wishes.rootfs.clone(),
        format: wishes.rootfs_format.clone(),
        upper_size: wishes.rootfs_upper_size.clone(),
        fstype: wishes.rootfs_fstype.clone(),
    };
    let source = request.source().map_err(wrong)?.below(&bundle.dir);
    Ok(match source {
        Source::Image { reference, .. } => {
            let own = bundle.annotations().get(IMAGE);
            if !reference.is_empty() && own.is_none_or(|own| *own != reference) {
                let reason = "it is neither a path nor the container's own image, and nacelle pulls none";
                return Err(refuse(ROOTFS, &reference, reason).into());
            }
            None
        }
        Source::Dir(path) => {
            let real = named_path(&config.annotations, ROOTFS, &path)?;
            if !real.is_dir() {
                return Err(
                    refuse(ROOTFS, &path.to_string_lossy(), "it is no directory, and no disk by its name").into()
                );
            }
            Some(Given::Directory(real))
        }
        Source::Disk { path, format, fstype } => {
            let wish = fstype.as_deref();
            let types = types(config, wish).map_err(|why| refuse(ROOTFS_FSTYPE, wish.unwrap_or_default(), why))?;
            let read_only =
                bundle.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false) || format == Format::Vmdk;
            let path = named_path(&config.annotations, ROOTFS, &path)?;
            Some(Given::Disk(Wanted { path, format, types, read_only, beside: false }))
        }
    })
}
