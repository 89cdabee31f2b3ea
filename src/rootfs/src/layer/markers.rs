//! Names by which OCI layers, and AUFS before them, say that something of a lower layer is gone.

const PREFIX: &[u8] = b".wh.";

/// What a name with the prefix means.
#[derive(Debug, PartialEq, Eq)]
pub enum Marker<'a> {
    /// The directory hides what is below it.
    Opaque,
    /// This name of the same directory is removed.
    Whiteout(&'a [u8]),
    /// AUFS's own books: nothing.
    Bookkeeping,
    /// It would remove the directory itself or its parent: a mistake or worse.
    Bad,
}

/// Reads a name; `None` when it is an ordinary one.
pub fn marker(name: &[u8]) -> Option<Marker<'_>> {
    Some(match name.strip_prefix(PREFIX)? {
        b".wh..opq" => Marker::Opaque,
        rest if rest.starts_with(PREFIX) => Marker::Bookkeeping,
        b"" | b"." | b".." => Marker::Bad,
        rest => Marker::Whiteout(rest),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_their_meaning() {
        let table: [(&[u8], Option<Marker>); 8] = [
            (b"file", None),
            (b".wh", None),
            (b".wh.file", Some(Marker::Whiteout(b"file"))),
            (b".wh..hidden", Some(Marker::Whiteout(b".hidden"))),
            (b".wh..wh..opq", Some(Marker::Opaque)),
            (b".wh..wh.plnk", Some(Marker::Bookkeeping)),
            (b".wh.", Some(Marker::Bad)),
            (b".wh...", Some(Marker::Bad)),
        ];
        for (name, meaning) in table {
            assert_eq!(marker(name), meaning);
        }
    }
}
