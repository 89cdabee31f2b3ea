//! `nacelle layer show`, `cat` and `tree`: looking into an EROFS image without mounting it. The image may be anybody's: it is read
//! by the reader that believes nothing, and names are escaped before a terminal sees them.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use nacelle_rootfs::erofs::reader::{Image, Inode};
use serde_json::{Value, json};

use crate::units;

/// Which file to show.
#[derive(clap::Args)]
pub struct Show {
    /// The image
    image: PathBuf,
    /// A path in it; symbolic links are not followed
    #[arg(default_value = "/")]
    path: PathBuf,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// Which file to print.
#[derive(clap::Args)]
pub struct Cat {
    /// The image
    image: PathBuf,
    /// A regular file in it; symbolic links are not followed
    path: PathBuf,
}

/// Which image to measure, and how.
#[derive(clap::Args)]
pub struct Tree {
    /// The image
    image: PathBuf,
    /// How many levels of directories to show
    #[arg(long, default_value_t = 2)]
    depth: usize,
    /// Print one JSON array instead of a picture
    #[arg(long)]
    json: bool,
}

type Opened<'a> = Image<'a, File>;

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("open image {}", path.display()))
}

fn lookup(image: &Opened, path: &Path) -> anyhow::Result<Inode> {
    Ok(image.lookup(path.as_os_str().as_bytes())?)
}

/// Shows an inode and, of a directory, its entries.
pub fn show(arguments: &Show, out: &mut impl io::Write) -> anyhow::Result<()> {
    let file = open(&arguments.image)?;
    let image = Image::open(&file)?;
    let inode = lookup(&image, &arguments.path)?;
    let link = if kind(&inode) == "symlink" { Some(image.link_target(&inode)?) } else { None };
    let xattrs = image.xattrs(&inode)?;
    let mut entries = Vec::new();
    if inode.is_directory() {
        let names = image.entries(&inode)?;
        for entry in names.into_iter().filter(|e| e.name != b"." && e.name != b"..") {
            entries.push((entry.name, image.inode(entry.nid)?));
        }
    }
    if arguments.json {
        let mut value = describe(&inode);
        value["path"] = json!(arguments.path.to_string_lossy());
        value["link"] = json!(link.map(|target| String::from_utf8_lossy(&target).into_owned()));
        let pair =
            |x: &nacelle_rootfs::tree::Xattr| (String::from_utf8_lossy(&x.name).into_owned(), json!(hex(&x.value)));
        value["xattrs"] = xattrs.iter().map(pair).collect::<serde_json::Map<_, _>>().into();
        let named = |(name, inode): &(Vec<u8>, Inode)| {
            let mut value = describe(inode);
            value["name"] = json!(String::from_utf8_lossy(name));
            value
        };
        value["entries"] = entries.iter().map(named).collect();
        serde_json::to_writer_pretty(&mut *out, &value)?;
        return Ok(writeln!(out)?);
    }
    writeln!(out, "{}", line(&inode, arguments.path.as_os_str().as_bytes()))?;
    if let Some(target) = link {
        writeln!(out, "  target {}", units::name(&target))?;
    }
    for xattr in &xattrs {
        writeln!(out, "  xattr  {} = {}", units::name(&xattr.name), hex(&xattr.value))?;
    }
    for (name, inode) in &entries {
        writeln!(out, "{}", line(inode, name))?;
    }
    Ok(())
}

/// Prints a file.
pub fn cat(arguments: &Cat, out: &mut impl io::Write) -> anyhow::Result<()> {
    let file = open(&arguments.image)?;
    let image = Image::open(&file)?;
    let inode = lookup(&image, &arguments.path)?;
    match kind(&inode) {
        "regular file" => {}
        "symlink" => {
            let target = image.link_target(&inode)?;
            bail!("print {}: it is a symbolic link to {}", arguments.path.display(), units::name(&target));
        }
        other => bail!("print {}: it is a {other}", arguments.path.display()),
    }
    let mut buffer = vec![0; 256 << 10];
    let mut offset = 0;
    while offset < inode.size {
        let n = image.read(&inode, offset, &mut buffer)?;
        ensure!(n > 0, "print {}: its data ends early", arguments.path.display());
        out.write_all(&buffer[..n])?;
        offset += n as u64;
    }
    Ok(())
}

/// A directory and what is in it.
struct Measured {
    name: Vec<u8>,
    depth: usize,
    bytes: u64,
    names: u64,
    children: Vec<Measured>,
}

/// Shows directories, the largest first, with a bar for their share.
pub fn tree(arguments: &Tree, out: &mut impl io::Write) -> anyhow::Result<()> {
    let file = open(&arguments.image)?;
    let image = Image::open(&file)?;
    let root = image.root()?;
    let mut seen = HashSet::from([root.nid]);
    let root = measure(&image, b"/".to_vec(), &root, 0, &mut seen)?;
    if arguments.json {
        let mut rows = Vec::new();
        visit(&root, arguments.depth, &mut Vec::new(), &mut |path, at| {
            rows.push(json!({ "path": String::from_utf8_lossy(path), "bytes": at.bytes, "names": at.names }));
            Ok(())
        })?;
        serde_json::to_writer_pretty(&mut *out, &rows)?;
        return Ok(writeln!(out)?);
    }
    visit(&root, arguments.depth, &mut Vec::new(), &mut |_, at| {
        let bar = bar(at.bytes, root.bytes);
        let name = units::name(&at.name);
        let indent = "  ".repeat(at.depth);
        Ok(writeln!(out, "{:>10} {:>7} names {bar} {indent}{name}", units::bytes(at.bytes), at.names)?)
    })
}

/// Deepest directory that is measured; no real path is longer.
const MAX_DEPTH: usize = 2048;

/// Sums up a directory. A file of several names counts once; `seen` ends loops in images that have them.
fn measure(
    image: &Opened,
    name: Vec<u8>,
    directory: &Inode,
    depth: usize,
    seen: &mut HashSet<u64>,
) -> anyhow::Result<Measured> {
    ensure!(depth <= MAX_DEPTH, "measure image: directories are nested too deeply");
    let mut here = Measured { name, depth, bytes: 0, names: 0, children: Vec::new() };
    for entry in image.entries(directory)? {
        if entry.name == b"." || entry.name == b".." {
            continue;
        }
        here.names += 1;
        let inode = image.inode(entry.nid)?;
        if !seen.insert(entry.nid) {
            continue;
        }
        if inode.is_directory() {
            let child = measure(image, entry.name, &inode, depth + 1, seen)?;
            here.bytes = here.bytes.saturating_add(child.bytes);
            here.names += child.names;
            here.children.push(child);
        } else if kind(&inode) == "regular file" {
            here.bytes = here.bytes.saturating_add(inode.size);
        }
    }
    here.children.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
    Ok(here)
}

/// Calls `each` with a path and its directory, down to `depth`.
fn visit(
    at: &Measured,
    depth: usize,
    path: &mut Vec<u8>,
    each: &mut impl FnMut(&[u8], &Measured) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let len = path.len();
    if at.depth > 1 {
        path.push(b'/');
    }
    path.extend(&at.name);
    each(path, at)?;
    if at.depth < depth {
        at.children.iter().try_for_each(|child| visit(child, depth, path, each))?;
    }
    path.truncate(len);
    Ok(())
}

/// Twenty cells, filled by the share of `part` in `whole`.
fn bar(part: u64, whole: u64) -> String {
    const CELLS: u64 = 20;
    let filled = (u128::from(part) * u128::from(CELLS)).div_ceil(u128::from(whole.max(1)));
    let filled = usize::try_from(filled).unwrap_or(0).min(CELLS as usize);
    format!("{}{}", "█".repeat(filled), "░".repeat(CELLS as usize - filled))
}

/// What an inode is; a whiteout is more than the device that it is made of.
fn kind(inode: &Inode) -> &'static str {
    if inode.is_whiteout() { "whiteout" } else { inode.kind() }
}

fn describe(inode: &Inode) -> Value {
    json!({
        "kind": kind(inode), "mode": format!("{:04o}", inode.mode & 0o7777), "uid": inode.uid, "gid": inode.gid,
        "size": inode.size, "links": inode.nlink, "mtime": inode.mtime.sec, "mtime_nsec": inode.mtime.nsec,
        "device": inode.device,
    })
}

fn line(inode: &Inode, name: &[u8]) -> String {
    let (mode, size) = (inode.mode & 0o7777, units::bytes(inode.size));
    let owner = format!("{}:{}", inode.uid, inode.gid);
    format!("{:<16} {mode:04o} {owner:<13} {size:>10}  {}", kind(inode), units::name(name))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nacelle_rootfs::erofs::writer::Plan;
    use nacelle_rootfs::{Limits, layer};

    use super::*;

    fn image(dir: &Path) -> PathBuf {
        let source = dir.join("source");
        fs::create_dir_all(source.join("usr/bin")).unwrap();
        fs::create_dir(source.join("etc")).unwrap();
        fs::write(source.join("usr/bin/large"), vec![b'x'; 300_000]).unwrap();
        fs::hard_link(source.join("usr/bin/large"), source.join("etc/large")).unwrap();
        fs::write(source.join("etc/host\x1bname"), "nacelle\n").unwrap();
        std::os::unix::fs::symlink("usr/bin", source.join("bin")).unwrap();
        let image = dir.join("image");
        let tree = layer::scan(&source, &Limits::default()).unwrap();
        Plan::new(&tree).unwrap().write(File::create(&image).unwrap()).unwrap();
        image
    }

    fn said(run: impl FnOnce(&mut Vec<u8>) -> anyhow::Result<()>) -> String {
        let mut out = Vec::new();
        run(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn trees_have_sizes_and_bars() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let picture = said(|out| tree(&Tree { image: image.clone(), depth: 2, json: false }, out));
        let rows: Vec<_> = picture.lines().collect();
        assert_eq!(rows.len(), 4, "{picture}");
        assert!(rows[0].contains("293.0 KiB       7 names ████████████████████ /"), "{picture}");
        assert!(picture.contains("    bin") && picture.contains("  etc"), "{picture}");
        let json = said(|out| tree(&Tree { image, depth: 9, json: true }, out));
        let rows: Vec<Value> = serde_json::from_str(&json).unwrap();
        let bytes = |path: &str| rows.iter().find(|row| row["path"] == path).unwrap()["bytes"].as_u64().unwrap();
        assert_eq!(bytes("/"), 300_008);
        assert_eq!(bytes("/usr/bin") + bytes("/etc"), 300_008, "a file of two names counts once");
    }

    #[test]
    fn files_are_shown_and_printed() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let show_path =
            |path: &str, json| said(|out| show(&Show { image: image.clone(), path: path.into(), json }, out));
        assert!(show_path("/etc", false).contains("host\\u{1b}name"));
        assert!(show_path("/bin", false).contains("target usr/bin"));
        let value: Value = serde_json::from_str(&show_path("/etc", true)).unwrap();
        assert_eq!(value["entries"][1]["links"], 2);
        let print = |path: &str, out: &mut Vec<u8>| cat(&Cat { image: image.clone(), path: path.into() }, out);
        assert_eq!(said(|out| print("/etc/host\x1bname", out)), "nacelle\n");
        assert_eq!(said(|out| print("usr/bin/large", out)).len(), 300_000);
        let refused = |path: &str| print(path, &mut Vec::new()).unwrap_err().to_string();
        assert_eq!(refused("/bin"), "print /bin: it is a symbolic link to usr/bin");
        assert_eq!(refused("/etc"), "print /etc: it is a directory");
        assert_eq!(refused("/none"), "find /none in image");
    }
}
