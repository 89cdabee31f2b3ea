//! The extents in the descriptor of a VMDK, as the VMM reads it (crate `imago`).
//!
//! ```text
//!  # Disk DescriptorFile
//!  version=1
//!  parentCID=ffffffff                         anything else means a parent
//!  RW 2048 FLAT "disk-f001.vmdk" 0            access, sectors, kind, name, first sector in the file
//!  RDONLY 2048 ZERO
//!  ddb.adapterType = "ide"
//! ```

use super::{Format, HeaderError, Written};

/// The longest descriptor.
pub(super) const MOST: u64 = 2 << 20;
/// More extents than any honest disk has; each is a file that the VMM holds open.
const EXTENTS: usize = 256;

/// Reads a whole descriptor.
pub(super) fn parse(image: &[u8]) -> Result<Vec<Written>, HeaderError> {
    let unsupported = |what, value: &str| HeaderError::Unsupported { what, value: value.chars().take(200).collect() };
    if image.starts_with(b"KDMV") || image.starts_with(b"COWD") {
        return Err(unsupported("kind of VMDK", "sparse"));
    }
    let text = std::str::from_utf8(image).map_err(|_| HeaderError::Magic)?;
    let mut version = None;
    let mut found: Vec<Written> = Vec::new();
    for line in text.split('\n').map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some((access @ ("RW" | "RDONLY" | "NOACCESS"), _)) = line.split_once(char::is_whitespace) {
            if access == "NOACCESS" {
                return Err(unsupported("access of an extent", access));
            }
            // One file may be cut into several extents.
            found.extend(extent(line)?.filter(|extent| !found.contains(extent)));
            if found.len() > EXTENTS {
                return Err(HeaderError::Bounds("list of more than 256 extents"));
            }
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { continue };
        match (key.trim(), value.trim()) {
            ("version", value) => version = Some(value.parse::<u32>().map_err(|_| HeaderError::Value("version"))?),
            ("parentFileNameHint", value) => return Err(unsupported("parent of a VMDK", value)),
            ("parentCID", value) if !value.eq_ignore_ascii_case("ffffffff") => {
                return Err(unsupported("parent of a VMDK", value));
            }
            ("changeTrackPath", value) => return Err(unsupported("change tracking of a VMDK", value)),
            _ => {}
        }
    }
    match version {
        None => Err(HeaderError::Magic),
        Some(1..=3) => Ok(found),
        Some(other) => Err(unsupported("version", &other.to_string())),
    }
}

/// One line of an extent; `None` for zeros.
fn extent(line: &str) -> Result<Option<Written>, HeaderError> {
    let mut words = line.split_whitespace().skip(1);
    let sectors = words.next().ok_or(HeaderError::Bounds("length of an extent"))?;
    sectors.parse::<u64>().map_err(|_| HeaderError::Value("length of an extent"))?;
    match words.next() {
        Some("ZERO") => return Ok(None),
        Some("FLAT") => {}
        Some(kind) => {
            let value = kind.chars().take(200).collect();
            return Err(HeaderError::Unsupported { what: "kind of extent", value });
        }
        None => return Err(HeaderError::Bounds("kind of an extent")),
    }
    const NAME: &str = "name of an extent";
    let mut quoted = line.splitn(3, '"').map(str::trim);
    let (before, name, after) = (quoted.next(), quoted.next(), quoted.next());
    let (Some(before), Some(name), Some(after)) = (before, name, after) else { return Err(HeaderError::Bounds(NAME)) };
    if before.split_whitespace().count() != 3 {
        return Err(HeaderError::Value(NAME));
    }
    let first = after.split_whitespace().next();
    if first.is_some_and(|first| first.parse::<u64>().is_err()) {
        return Err(HeaderError::Value("first sector of an extent"));
    }
    Ok(Some(Written { role: "extent", name: name.to_owned(), format: Format::Raw, writable: false }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(lines: &str) -> Result<Vec<String>, String> {
        let text = format!("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n{lines}\n");
        let found = parse(text.as_bytes()).map_err(|e| e.to_string())?;
        Ok(found.into_iter().map(|extent| extent.name).collect())
    }

    #[test]
    fn extents_are_read() {
        let lines = "RW 10 FLAT \"a b.vmdk\" 0\r\n  RDONLY\t10 FLAT \"/x/c\"\nRW 5 ZERO\nRW 1 FLAT \"a b.vmdk\" 10\nddb.x=\"y\"\n#RW";
        assert_eq!(names(lines), Ok(vec!["a b.vmdk".into(), "/x/c".into()]));
        assert_eq!(names("nothing of this\nRW"), Ok(vec![]));
    }

    #[test]
    fn other_extents_and_parents_are_refused_by_name() {
        let table = [
            ("RW 10 SPARSE \"a\"", "kind of extent \"SPARSE\" is not supported"),
            ("RW 10 VMFS \"a\" 0", "kind of extent \"VMFS\" is not supported"),
            ("NOACCESS 10", "access of an extent \"NOACCESS\" is not supported"),
            ("RW", ""),
            ("RW x", "length of an extent makes no sense"),
            ("RW 10", "kind of an extent is cut off or out of bounds"),
            ("RW 99999999999999999999 FLAT \"a\"", "length of an extent makes no sense"),
            ("RW 10 FLAT a 0", "name of an extent is cut off or out of bounds"),
            ("RW 10 FLAT \"a", "name of an extent is cut off or out of bounds"),
            ("RW 10 FLAT 0 \"a\"", "name of an extent makes no sense"),
            ("RW 10 FLAT \"a\" x", "first sector of an extent makes no sense"),
            ("parentFileNameHint=\"base.vmdk\"", "parent of a VMDK \"\\\"base.vmdk\\\"\" is not supported"),
            ("parentCID=11111111", "parent of a VMDK \"11111111\" is not supported"),
            ("changeTrackPath=\"x\"", "change tracking of a VMDK \"\\\"x\\\"\" is not supported"),
            ("version=9", "version \"9\" is not supported"),
            ("version=x", "version makes no sense"),
        ];
        for (line, error) in table {
            match error {
                "" => assert_eq!(names(line), Ok(vec![])),
                error => assert_eq!(names(line), Err(error.into()), "{line}"),
            }
        }
        let sparse = Err(HeaderError::Unsupported { what: "kind of VMDK", value: "sparse".into() });
        assert_eq!(parse(b"KDMV\x01\0\0\0"), sparse);
        assert_eq!(parse(b"COWD"), sparse);
        for text in [&b""[..], b"\xff\xfe", b"# Disk DescriptorFile\n", &[0; 512]] {
            assert_eq!(parse(text), Err(HeaderError::Magic));
        }
        let many: String = (0..300).map(|n| format!("RW 1 FLAT \"{n}\"\n")).collect();
        assert!(names(&many).unwrap_err().contains("more than 256 extents"));
    }
}
