//! Where a path leads when symbolic links on it are followed, inside the image and nowhere else.
//!
//! ```text
//!  /bin/x      /bin → usr/bin            /usr/bin/x
//!  /run/x      /var/run → /run, say      /run/x         absolute targets begin at the image's root
//!  /a/x        /a → ../../../b           /b/x           the root is its own parent
//! ```
//!
//! Links are looked up in what the container would see: the layers, and the patches before this one. The host is not asked.

use super::ApplyError;
use super::apply::{Seen, Upper};
use crate::path::{GuestPath, show};
use crate::tree::Node;

/// As many as Linux follows.
const LINKS: usize = 40;
/// Longest path, as for Linux.
const PATH_MAX: usize = 4095;

type Name = Box<[u8]>;

/// The path that `path` leads to: links among its parents are followed, and its last name when `last_too` says so. What does not
/// exist has no links; but a `..` in a target must be the parent of a directory that does.
pub(super) fn follow(upper: &Upper, path: &GuestPath, last_too: bool) -> Result<GuestPath, ApplyError> {
    let mut at: Vec<Name> = Vec::new();
    // The next name last.
    let mut rest: Vec<Name> = path.names().iter().rev().cloned().collect();
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if matches!(*name, [b'.'] | [b'.', b'.']) {
            must_be_directory(upper, &at)?;
            if name.len() == 2 {
                at.pop();
            }
            continue;
        }
        at.push(name);
        if rest.is_empty() && !last_too {
            break;
        }
        let Some(target) = link(upper, &at)? else { continue };
        links += 1;
        if links > LINKS {
            return Err(ApplyError::Limit { what: "symbolic links on the way", limit: LINKS as u64 });
        }
        at.pop();
        if target.starts_with(b"/") {
            at.clear();
        }
        rest.extend(names(&target));
        if rest.iter().map(|name| name.len() + 1).sum::<usize>() > PATH_MAX {
            return Err(ApplyError::Limit { what: "bytes in a path that links lead to", limit: PATH_MAX as u64 });
        }
    }
    let joined = at.iter().flat_map(|name| [b"/", &**name].concat()).collect::<Vec<u8>>();
    match joined.as_slice() {
        b"" => Err(ApplyError::Kind { kind: "directory" }),
        joined => GuestPath::parse(joined)
            .map_err(|_| ApplyError::Limit { what: "bytes in a path that links lead to", limit: PATH_MAX as u64 }),
    }
}

/// The names of a target, the last one first. A slash at its end asks for a directory, which `.` does as well.
fn names(target: &[u8]) -> impl Iterator<Item = Name> {
    let end = target.ends_with(b"/").then(|| Name::from(&b"."[..]));
    end.into_iter().chain(target.rsplit(|&b| b == b'/').filter(|name| !name.is_empty()).map(Name::from))
}

/// The target of the link at a path; `None` for what is no link.
fn link(upper: &Upper, at: &[Name]) -> Result<Option<Vec<u8>>, ApplyError> {
    match upper.see(at)? {
        Seen::Patched(id) => Ok(match &upper.tree.inode(id).node {
            Node::Symlink(target) => Some(target.to_vec()),
            _ => None,
        }),
        Seen::Lower(found) if found.inode.kind() == "symlink" => match upper.stack.image(found.layer) {
            Some(image) => Ok(Some(image.link_target(&found.inode).map_err(|e| upper.read_failed(&found, e))?)),
            None => Ok(None),
        },
        Seen::Lower(_) | Seen::Nothing => Ok(None),
    }
}

fn must_be_directory(upper: &Upper, at: &[Name]) -> Result<(), ApplyError> {
    if at.is_empty() {
        return Ok(());
    }
    let kind = match upper.see(at)? {
        Seen::Patched(id) => upper.tree.inode(id).kind(),
        Seen::Lower(found) => found.inode.kind(),
        Seen::Nothing => "it does not exist",
    };
    if kind == "directory" { Ok(()) } else { Err(ApplyError::Parent { prefix: show(at), kind }) }
}
