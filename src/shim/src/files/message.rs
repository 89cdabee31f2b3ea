//! FUSE messages, as far as the shim looks at them (fuse(4), `linux/fuse.h`; numbers in the host's byte order).
//!
//! ```text
//!  message   u32 length │ u32 opcode │ u64 unique │ u64 node │ u32 uid │ u32 gid │ u32 pid │ u32 …    40 bytes, then the body
//!  answer    u32 length │ i32 -errno │ u64 unique                                                     16 bytes, then the body
//!
//!  FUSE_INIT           u32 major │ u32 minor │ u32 read ahead │ u32 flags │ …
//!  its answer          u32 major │ u32 minor │ u32 read ahead │ u32 flags │ u16 background │ u16 congestion
//!                      u32 most data of a write │ u32 ns of a time │ 9 × u32 0                        64 bytes
//!
//!  FUSE_LOOKUP         name, 0
//!  its answer          u64 node │ u64 0 │ u64 s the name is good │ u64 s the attributes are │ u32 0 │ u32 0
//!                      u64 inode │ 5 × u64 0 │ 3 × u32 0 │ u32 mode │ u32 links │ 5 × u32 0           128 bytes
//! ```

use nacelle_protocol::agent::{FILES_DATA, FILES_HEADER, FILES_MESSAGE};
use rustix::io::Errno;

/// Length of an answer's header.
pub const ANSWER_HEADER: usize = 16;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// The interface that is spoken: 7.31, which every kernel since Linux 5.4 knows.
const VERSION: (u32, u32) = (7, 31);
/// Node of the root (FUSE_ROOT_ID).
const ROOT: u64 = 1;
/// Node of [`PROC`], which no server of a guest's comes to by counting.
const PROC_NODE: u64 = u64::MAX;
/// For ever.
const GOOD: u64 = 1 << 32;
/// The name in the root that the shim answers for: a directory to mount on.
pub const PROC: &str = "proc";

/// What the kernel may do: read ahead of those who ask (FUSE_ASYNC_READ), and write more than a page (FUSE_BIG_WRITES).
const FLAGS: u32 = 1 | 1 << 5;
/// Messages that may wait for something in the background, and from how many on there are too many.
const BACKGROUND: (u16, u16) = (12, 9);

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first one, which the shim answers itself.
    Init,
    /// It wants an answer.
    Question,
    /// It wants none.
    Note,
    /// It takes back a question, which nobody can: the answer will come, or its time is up.
    Interrupt,
}

/// A message of the kernel's.
#[derive(Debug)]
pub struct Message(Vec<u8>);

impl Message {
    /// What was read from the device in one piece. `None` for what is no message.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        let whole = bytes.len() >= FILES_HEADER && number(&bytes, 0) as usize == bytes.len();
        whole.then(|| {
            let mut bytes = bytes;
            // Whoever asks on the host is none of the guest's business, but for the ids.
            bytes[32..36].fill(0);
            Self(bytes)
        })
    }

    /// What becomes of it.
    pub fn kind(&self) -> Kind {
        match number(&self.0, 4) {
            INIT => Kind::Init,
            FORGET | BATCH_FORGET => Kind::Note,
            INTERRUPT => Kind::Interrupt,
            _ => Kind::Question,
        }
    }

    /// Its name, in its answer.
    pub fn unique(&self) -> u64 {
        unique(&self.0)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Offers no more than the shim takes: what a server of the guest's agrees to is then what the kernel was told.
    pub fn bound(&mut self) {
        if self.kind() == Kind::Init
            && let Some(flags) = self.0.get_mut(FILES_HEADER + 12..FILES_HEADER + 16)
        {
            let both = u32::from_ne_bytes([flags[0], flags[1], flags[2], flags[3]]) & FLAGS;
            flags.copy_from_slice(&both.to_ne_bytes());
        }
    }

    /// The answer to [`Kind::Init`]; `None` where the kernel speaks another language.
    pub fn init_answer(&self) -> Option<Vec<u8>> {
        let body = self.0.get(FILES_HEADER..FILES_HEADER + 16)?;
        let (major, minor, ahead, offered) = (number(body, 0), number(body, 4), number(body, 8), number(body, 12));
        if major != VERSION.0 || minor < VERSION.1 {
            return None;
        }
        let words = [VERSION.0, VERSION.1, ahead, offered & FLAGS];
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.extend(BACKGROUND.0.to_ne_bytes());
        body.extend(BACKGROUND.1.to_ne_bytes());
        body.extend((FILES_DATA as u32).to_ne_bytes());
        // Times count nanoseconds.
        body.extend(1u32.to_ne_bytes());
        body.resize(64, 0);
        Some(self.answered(&body))
    }

    /// The answer to the question for [`PROC`] in the root; `None` for all others.
    pub fn proc_answer(&self) -> Option<Vec<u8>> {
        let name = self.0[FILES_HEADER..].split_last().filter(|(end, _)| **end == 0)?.1;
        if number(&self.0, 4) != LOOKUP || long(&self.0, 16) != ROOT || name != PROC.as_bytes() {
            return None;
        }
        let words = [PROC_NODE, 0, GOOD, GOOD, 0, PROC_NODE];
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.resize(body.len() + 5 * 8 + 3 * 4, 0);
        // A directory that everybody may pass.
        body.extend([0o040_555u32, 2].iter().flat_map(|word| word.to_ne_bytes()));
        body.resize(128, 0);
        Some(self.answered(&body))
    }

    /// The answer with this body.
    fn answered(&self, body: &[u8]) -> Vec<u8> {
        [&header(ANSWER_HEADER + body.len(), 0, self.unique())[..], body].concat()
    }
}

/// The answer that says no.
pub fn refusal(unique: u64, errno: Errno) -> [u8; ANSWER_HEADER] {
    header(ANSWER_HEADER, -errno.raw_os_error(), unique)
}

fn header(length: usize, error: i32, unique: u64) -> [u8; ANSWER_HEADER] {
    let mut header = [0; ANSWER_HEADER];
    header[..4].copy_from_slice(&(length as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// Length of the answer that begins with this header, and whom it answers; `None` for what the kernel would not take.
pub fn answer(header: &[u8; ANSWER_HEADER]) -> Option<(usize, u64)> {
    let (length, error) = (number(header, 0) as usize, number(header, 4).cast_signed());
    // The kernel's own numbers of errors end at 512 for those outside (linux/errno.h).
    let fits = (ANSWER_HEADER..=FILES_MESSAGE).contains(&length) && (-511..=0).contains(&error);
    // An answer to nobody would be a command to the kernel.
    let unique = unique(header);
    (fits && unique != 0).then_some((length, unique))
}

/// The number at `at`, zero where there is none.
fn number(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn unique(bytes: &[u8]) -> u64 {
    long(bytes, 8)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(opcode: u32, unique: u64, body: &[u32]) -> Message {
        let mut bytes = vec![0; FILES_HEADER];
        bytes.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        bytes[32..36].copy_from_slice(&99u32.to_ne_bytes());
        Message::new(bytes).expect("message")
    }

    #[test]
    fn messages_keep_the_hosts_process_to_themselves() {
        let message = message(3, 8, &[]);
        assert_eq!((message.kind(), message.unique(), number(message.bytes(), 32)), (Kind::Question, 8, 0));
        assert!(Message::new(vec![0; FILES_HEADER - 1]).is_none());
        assert!(Message::new(vec![0; FILES_HEADER]).is_none(), "its length is another");
    }

    #[test]
    fn init_is_answered_within_what_both_know() {
        let mut init = message(INIT, 2, &[7, 40, 131_072, u32::MAX]);
        let answer = init.init_answer().expect("answer");
        assert_eq!((answer.len(), number(&answer, 0)), (80, 80));
        let words: Vec<u32> = (16..32).step_by(4).map(|at| number(&answer, at)).collect();
        assert_eq!(words, [7, 31, 131_072, FLAGS]);
        assert_eq!(number(&answer, 36), FILES_DATA as u32);
        init.bound();
        assert_eq!(number(init.bytes(), FILES_HEADER + 12), FLAGS);
        for other in [[8, 0, 0, 0], [7, 30, 0, 0]] {
            assert!(message(INIT, 2, &other).init_answer().is_none());
        }
        assert!(message(INIT, 2, &[7]).init_answer().is_none(), "cut short");
    }

    #[test]
    fn the_place_for_proc_is_the_shims() {
        let lookup = |opcode: u32, node: u64, name: &[u8]| {
            let mut message = message(opcode, 4, &[]).0;
            message.extend(name);
            let length = message.len() as u32;
            message[..4].copy_from_slice(&length.to_ne_bytes());
            message[16..24].copy_from_slice(&node.to_ne_bytes());
            Message::new(message).expect("message").proc_answer()
        };
        let answer = lookup(1, 1, b"proc\0").expect("an answer");
        assert_eq!((answer.len(), number(&answer, 0), unique(&answer)), (144, 144, 4));
        // Behind entry_out's 40 bytes, six numbers of 8 and three of 4: the mode.
        assert_eq!((long(&answer, 16), number(&answer, 16 + 40 + 60)), (u64::MAX, 0o040_555));
        for other in
            [lookup(1, 1, b"process\0"), lookup(1, 2, b"proc\0"), lookup(3, 1, b"proc\0"), lookup(1, 1, b"proc")]
        {
            assert!(other.is_none());
        }
        assert!(lookup(1, 1, b"").is_none());
    }

    #[test]
    fn answers_are_checked_before_the_kernel_sees_them() {
        let header = |length: u32, error: i32, unique: u64| {
            let mut header = refusal(unique, Errno::IO);
            header[..4].copy_from_slice(&length.to_ne_bytes());
            header[4..8].copy_from_slice(&error.to_ne_bytes());
            answer(&header)
        };
        assert_eq!(header(16, -2, 4), Some((16, 4)));
        assert_eq!(header(FILES_MESSAGE as u32, 0, 4), Some((FILES_MESSAGE, 4)));
        let wrong = [
            header(15, 0, 4),
            header(FILES_MESSAGE as u32 + 1, 0, 4),
            header(16, 1, 4),
            header(16, -512, 4),
            header(16, 2, 0),
        ];
        assert_eq!(wrong, [None; 5]);
        assert_eq!(answer(&refusal(9, Errno::IO)), Some((16, 9)));
    }
}
