//! The names in the header of a qcow2 image, as the VMM reads it (crate `imago`).
//!
//! ```text
//!  0    magic, version               big-endian, all of it
//!  8    offset and 16 length of the backing file's name
//!  20   log2 of the cluster size
//!  72   incompatible features        version 3 alone; its header's length is at 100, and after the header come
//!  ..   extensions: kind, length, data to a multiple of 8 · the end is kind 0
//!  ..   the backing file's name      all of this in the first cluster
//! ```
//!
//! The VMM reads no extensions of version 2. It would then look into a backing file to find out what it is, so such images are
//! refused, whatever an extension says.

use super::{Format, HeaderError, Written};

/// As much as is read: the largest cluster that there is.
pub(super) const MOST: u64 = 2 << 20;

const MAGIC: u32 = 0x5146_49fb;
/// The name of the backing file may be no longer.
const NAME_MAX: u32 = 1023;

/// The one incompatible feature that the VMM knows.
const HAS_DATA_FILE: u64 = 1 << 2;
/// The first incompatible features, from bit 0.
const FEATURES: [&str; 5] = ["dirty", "corrupt", "external data file", "compression type", "extended L2 entries"];

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;
const FEATURE_NAMES: u32 = 0x6803_f857;

/// Reads the names from the start of an image, which may be cut off after its first cluster.
pub(super) fn parse(image: &[u8]) -> Result<Vec<Written>, HeaderError> {
    if u32_at(image, 0, "magic number") != Ok(MAGIC) {
        return Err(HeaderError::Magic);
    }
    let version = u32_at(image, 4, "version")?;
    let cluster_bits = u32_at(image, 20, "cluster size")?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(HeaderError::Value("cluster size"));
    }
    if u32_at(image, 32, "encryption")? != 0 {
        return Err(HeaderError::Unsupported { what: "encryption of qcow2", value: "on".into() });
    }
    let cluster = image.get(..1 << cluster_bits).unwrap_or(image);
    let (features, extensions) = match version {
        2 => (0, Extensions::default()),
        3 => {
            let header = u32_at(image, 100, "header length")?;
            if header < 104 || !header.is_multiple_of(8) {
                return Err(HeaderError::Value("header length"));
            }
            (u64_at(image, 72, "incompatible features")?, Extensions::read(cluster, header)?)
        }
        _ => return Err(HeaderError::Unsupported { what: "version", value: version.to_string() }),
    };
    let unknown = features & !HAS_DATA_FILE;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let name = FEATURES.get(bit as usize).map_or_else(|| format!("bit {bit}"), |name| (*name).to_owned());
        return Err(HeaderError::Unsupported { what: "incompatible feature", value: name });
    }
    let mut found = Vec::new();
    if features & HAS_DATA_FILE != 0 {
        let name = extensions.data_file.ok_or(HeaderError::Bounds("name of the data file"))?;
        let name = text(name, "data file")?;
        found.push(Written { role: "data file", name, format: Format::Raw, writable: true });
    }
    found.extend(backing(cluster, extensions.backing_format)?);
    Ok(found)
}

fn backing(cluster: &[u8], format: Option<&[u8]>) -> Result<Option<Written>, HeaderError> {
    let (offset, length) = (u64_at(cluster, 8, "backing file")?, u32_at(cluster, 16, "backing file")?);
    if offset == 0 {
        return Ok(None);
    }
    if length > NAME_MAX {
        return Err(HeaderError::Bounds("name of the backing file"));
    }
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = cluster.get(start..start.saturating_add(length as usize));
    let name = text(name.ok_or(HeaderError::Bounds("name of the backing file"))?, "backing file")?;
    let format = match format {
        None => return Err(HeaderError::NoFormat(name)),
        Some(b"qcow2") => Format::Qcow2,
        Some(b"raw" | b"file") => Format::Raw,
        Some(other) => {
            let value = String::from_utf8_lossy(other).chars().take(200).collect();
            return Err(HeaderError::Unsupported { what: "format of the backing file", value });
        }
    };
    Ok(Some(Written { role: "backing file", name, format, writable: false }))
}

/// The extensions that have to do with other files. One that comes twice is refused: readers differ in which of them counts.
#[derive(Default)]
struct Extensions<'a> {
    backing_format: Option<&'a [u8]>,
    data_file: Option<&'a [u8]>,
}

impl Extensions<'_> {
    fn read(cluster: &[u8], header: u32) -> Result<Extensions<'_>, HeaderError> {
        const WHAT: &str = "header extension";
        let mut found = Extensions::default();
        let mut at = header as usize;
        loop {
            let kind = u32_at(cluster, at, WHAT)?;
            if kind == END {
                return Ok(found);
            }
            let length = u32_at(cluster, at + 4, WHAT)? as usize;
            let data =
                cluster.get(at + 8..at.saturating_add(8).saturating_add(length)).ok_or(HeaderError::Bounds(WHAT))?;
            // The VMM does not survive an entry that is cut off.
            if kind == FEATURE_NAMES && !length.is_multiple_of(48) {
                return Err(HeaderError::Value("length of the names of features"));
            }
            let place = match kind {
                BACKING_FORMAT => Some(&mut found.backing_format),
                DATA_FILE => Some(&mut found.data_file),
                _ => None,
            };
            if place.is_some_and(|place| place.replace(data).is_some()) {
                return Err(HeaderError::Value("header extension that comes twice"));
            }
            at += 8 + length.next_multiple_of(8);
        }
    }
}

fn text(bytes: &[u8], role: &'static str) -> Result<String, HeaderError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        let name = String::from_utf8_lossy(bytes).chars().take(200).collect();
        HeaderError::Name { role, name, why: "it is not UTF-8" }
    })
}

fn u32_at(bytes: &[u8], at: usize, what: &'static str) -> Result<u32, HeaderError> {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    four.map(|four| u32::from_be_bytes(*four)).ok_or(HeaderError::Bounds(what))
}

fn u64_at(bytes: &[u8], at: usize, what: &'static str) -> Result<u64, HeaderError> {
    let eight = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
    eight.map(|eight| u64::from_be_bytes(*eight)).ok_or(HeaderError::Bounds(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Features, extensions and the backing file's name; version 3 unless `extensions` is none.
    fn header(features: u64, extensions: Option<&[(u32, &[u8])]>, backing: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1 << 16];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &if extensions.is_some() { 3u32 } else { 2 }.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(72, &features.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        let mut at = 104;
        for (kind, data) in extensions.unwrap_or_default() {
            put(at, &kind.to_be_bytes());
            put(at + 4, &u32::try_from(data.len()).unwrap().to_be_bytes());
            put(at + 8, data);
            at += 8 + data.len().next_multiple_of(8);
        }
        if !backing.is_empty() {
            put(8, &4096u64.to_be_bytes());
            put(16, &u32::try_from(backing.len()).unwrap().to_be_bytes());
            put(4096, backing);
        }
        image
    }

    fn names(image: &[u8]) -> Result<Vec<(&'static str, String, Format)>, String> {
        let found = parse(image).map_err(|e| e.to_string())?;
        Ok(found.into_iter().map(|Written { role, name, format, .. }| (role, name, format)).collect())
    }

    #[test]
    fn headers_name_their_files() {
        let backing = |name: &str, format| Ok(vec![("backing file", name.to_owned(), format)]);
        assert_eq!(names(&header(0, Some(&[]), b"")), Ok(vec![]));
        assert_eq!(names(&header(0, None, b"")), Ok(vec![]));
        assert_eq!(names(&header(0, Some(&[(BACKING_FORMAT, b"raw")]), b"base")), backing("base", Format::Raw));
        assert_eq!(names(&header(0, Some(&[(BACKING_FORMAT, b"file")]), b"base")), backing("base", Format::Raw));
        assert_eq!(
            names(&header(0, Some(&[(7, b"feature names"), (BACKING_FORMAT, b"qcow2")]), b"/x/base")),
            backing("/x/base", Format::Qcow2)
        );
        assert_eq!(
            names(&header(HAS_DATA_FILE, Some(&[(DATA_FILE, b"data"), (BACKING_FORMAT, b"raw")]), b"base")),
            Ok(vec![("data file", "data".into(), Format::Raw), ("backing file", "base".into(), Format::Raw)])
        );
        // Named, and not in use.
        assert_eq!(names(&header(0, Some(&[(DATA_FILE, b"data")]), b"")), Ok(vec![]));
    }

    #[test]
    fn a_backing_file_without_a_format_is_refused() {
        let error = "backing file \"base\" is named without its format, which is never guessed";
        assert_eq!(names(&header(0, Some(&[]), b"base")), Err(error.into()));
        // The VMM does not read the extensions of version 2.
        assert_eq!(names(&header(0, None, b"base")), Err(error.into()));
        let other = names(&header(0, Some(&[(BACKING_FORMAT, b"vmdk")]), b"base"));
        assert_eq!(other, Err("format of the backing file \"vmdk\" is not supported".into()));
    }

    #[test]
    fn absurd_headers_are_refused() {
        let with = |at: usize, bytes: &[u8]| {
            let mut image = header(0, Some(&[(BACKING_FORMAT, b"raw")]), b"base");
            image[at..at + bytes.len()].copy_from_slice(bytes);
            names(&image)
        };
        let table: [(usize, &[u8], &str); 14] = [
            (0, b"QFI\xfa", "it does not begin as such an image does"),
            (4, &[0, 0, 0, 1], "version \"1\" is not supported"),
            (20, &[0, 0, 0, 8], "cluster size makes no sense"),
            (20, &[255; 4], "cluster size makes no sense"),
            (32, &[0, 0, 0, 2], "encryption of qcow2 \"on\" is not supported"),
            (72, &[255; 8], "incompatible feature \"dirty\" is not supported"),
            (72, &[128, 0, 0, 0, 0, 0, 0, 0], "incompatible feature \"bit 63\" is not supported"),
            (100, &[0, 0, 0, 72], "header length makes no sense"),
            (100, &[255; 4], "header length makes no sense"),
            (100, &[127, 255, 255, 248], "header extension is cut off or out of bounds"),
            (108, &[255; 4], "header extension is cut off or out of bounds"),
            (8, &[255; 8], "name of the backing file is cut off or out of bounds"),
            (16, &[255; 4], "name of the backing file is cut off or out of bounds"),
            (4096, &[255], "backing file \"\u{fffd}ase\" is not the path of a file: it is not UTF-8"),
        ];
        for (at, bytes, error) in table {
            assert_eq!(with(at, bytes), Err(error.into()), "{at}: {bytes:?}");
        }
        assert!(names(&header(HAS_DATA_FILE, Some(&[]), b"")).unwrap_err().contains("name of the data file"));
        let twice = names(&header(0, Some(&[(BACKING_FORMAT, b"raw"), (BACKING_FORMAT, b"qcow2")]), b"base"));
        assert!(twice.unwrap_err().contains("comes twice"));
        let cut = names(&header(0, Some(&[(FEATURE_NAMES, &[0; 49])]), b""));
        assert_eq!(cut, Err("length of the names of features makes no sense".into()));
    }

    /// Cut anywhere, and with any byte turned around.
    #[test]
    fn damaged_headers_never_panic() {
        let sound = header(HAS_DATA_FILE, Some(&[(DATA_FILE, b"data"), (BACKING_FORMAT, b"raw")]), b"base");
        for length in 0..5000 {
            let _ = parse(&sound[..length]);
        }
        for at in 0..200 {
            for bits in [1, 0x80, 0xff] {
                let mut image = sound.clone();
                image[at] ^= bits;
                let _ = parse(&image);
                let _ = parse(&image[..4098]);
            }
        }
    }
}
