//! What was there at the start → the directory that gets the changes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, XattrFlags, fgetxattr, linkat, open};

use super::apply::{Apply, DIRECTORY};
use super::attributes::names;
use super::{ChangesError, failed};
use crate::tree::Time;

impl Apply<'_> {
    /// Gives the directory what `start` has: directories are copied, anything else gets one more name.
    pub fn begin_with(&mut self, start: &Path) -> Result<(), ChangesError> {
        let mut waiting = vec![PathBuf::new()];
        while let Some(below) = waiting.pop() {
            let (from, to) = (start.join(&below), self.path.join(&below));
            self.directory_like(&from, &to, &below)?;
            for entry in fs::read_dir(&from).map_err(failed("list", &from))? {
                let entry = entry.map_err(failed("list", &from))?;
                let (from, to) = (entry.path(), to.join(entry.file_name()));
                if entry.file_type().map_err(failed("look at", &from))?.is_dir() {
                    fs::create_dir(&to).map_err(failed("create", &to))?;
                    waiting.push(below.join(entry.file_name()));
                } else {
                    linkat(CWD, &from, CWD, &to, AtFlags::empty()).map_err(failed("link to", &to))?;
                }
            }
        }
        Ok(())
    }

    fn directory_like(&mut self, from: &Path, to: &Path, below: &Path) -> Result<(), ChangesError> {
        let source = open(from, DIRECTORY, Mode::empty()).map_err(failed("open", from))?;
        let target = open(to, DIRECTORY, Mode::empty()).map_err(failed("open", to))?;
        let like = fs::symlink_metadata(from).map_err(failed("look at", from))?;
        std::os::unix::fs::fchown(&target, Some(like.uid()), Some(like.gid())).map_err(failed("own", to))?;
        for name in names(&source).map_err(failed("list attributes of", from))? {
            let mut value = vec![0; 64 << 10];
            let len = fgetxattr(&source, name.as_slice(), &mut value).map_err(failed("read attribute of", from))?;
            rustix::fs::fsetxattr(&target, name.as_slice(), &value[..len], XattrFlags::empty())
                .map_err(failed("set attribute of", to))?;
        }
        fs::set_permissions(to, fs::Permissions::from_mode(like.mode() & 0o7777)).map_err(failed("set mode of", to))?;
        let path = below.as_os_str().as_encoded_bytes().to_vec();
        let nsec = u32::try_from(like.mtime_nsec()).unwrap_or_default();
        self.times.insert(path, Time { sec: like.mtime(), nsec });
        Ok(())
    }
}
