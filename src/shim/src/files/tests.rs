//! A test plays the kernel, at the other end of a socket that keeps messages apart as the device does, and the guest.

use nacelle_protocol::agent::FILES_HEADER;
use nacelle_protocol::stream::{HEADER_LEN, Header};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::*;

struct World {
    kernel: OwnedFd,
    input: UnixStream,
    output: UnixStream,
    end: tokio::task::JoinHandle<Result<(), FilesError>>,
}

fn message(opcode: u32, unique: u64) -> Message {
    let mut bytes = vec![0; FILES_HEADER + 16];
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
    Message::new(bytes).expect("message")
}

fn answer(unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = message::refusal(unique, Errno::IO).to_vec();
    bytes[4..8].fill(0);
    bytes.extend(body);
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

impl World {
    /// The question 4 is on its way to the guest.
    fn new() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (kernel, device) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("socket pair");
        let (input, theirs_in) = UnixStream::pair().expect("socket pair");
        let (output, theirs_out) = UnixStream::pair().expect("socket pair");
        let files = Files::new(device).expect("files");
        let streams = Streams { input: theirs_in, output: theirs_out };
        let exchange = async move { files.exchange(streams, message(26, 2), message(3, 4)).await };
        Self { kernel, input, output, end: tokio::spawn(exchange) }
    }

    fn ask(&self, message: &Message) {
        send(&self.kernel, message.bytes(), SendFlags::empty()).expect("asked");
    }

    /// What the guest gets next.
    async fn asked(&mut self) -> Vec<u8> {
        let mut header = [0; HEADER_LEN];
        self.input.read_exact(&mut header).await.expect("frame");
        let mut bytes = vec![0; Header::decode(&header).expect("header").len as usize];
        self.input.read_exact(&mut bytes).await.expect("data");
        bytes
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.output.write_all(&Header::data(bytes.len() as u32).encode()).await.expect("said");
        self.output.write_all(bytes).await.expect("said");
    }

    /// What the kernel is told next.
    async fn told(&self) -> Vec<u8> {
        let mut bytes = vec![0; FILES_MESSAGE];
        loop {
            match recv(&self.kernel, bytes.as_mut_slice(), RecvFlags::empty()) {
                Ok((length, _)) => {
                    bytes.truncate(length);
                    return bytes;
                }
                Err(Errno::AGAIN) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(error) => panic!("receive: {error}"),
            }
        }
    }
}

#[tokio::test]
async fn questions_and_answers_find_each_other() {
    let mut world = World::new();
    let mut got = Vec::new();
    while got.len() < 2 * (FILES_HEADER + 16) {
        got.extend(world.asked().await);
    }
    assert_eq!(got[..FILES_HEADER], message(26, 2).bytes()[..FILES_HEADER], "the guest hears FUSE_INIT first");
    assert_eq!(got[FILES_HEADER + 16..], *message(3, 4).bytes());
    // A forget wants no answer, an interrupt does not get to the guest.
    world.ask(&message(2, 6));
    world.ask(&message(36, 5));
    world.ask(&message(1, 8));
    let mut got = Vec::new();
    while got.len() < 2 * (FILES_HEADER + 16) {
        got.extend(world.asked().await);
    }
    assert_eq!(got, [message(2, 6).bytes(), message(1, 8).bytes()].concat());
    // In pieces, in another order, and with answers to nothing in between.
    let all = [answer(2, &[0; 64]), answer(8, b"eight"), answer(6, b"forgotten"), answer(77, b""), answer(4, b"four")]
        .concat();
    for piece in all.chunks(7) {
        world.say(piece).await;
    }
    assert_eq!(world.told().await, answer(8, b"eight"));
    assert_eq!(world.told().await, answer(4, b"four"));
    // Once each.
    world.say(&[answer(4, b"again"), answer(8, b"again")].concat()).await;
    world.ask(&message(1, 10));
    world.asked().await;
    world.say(&answer(10, b"ten")).await;
    assert_eq!(world.told().await, answer(10, b"ten"));
}

#[tokio::test]
async fn an_answer_that_is_none_ends_it() {
    let mut long = answer(4, b"");
    long[..4].copy_from_slice(&(FILES_MESSAGE as u32 + 1).to_ne_bytes());
    let mut short = answer(4, b"");
    short[..4].copy_from_slice(&3u32.to_ne_bytes());
    let mut positive = answer(4, b"");
    positive[4..8].copy_from_slice(&5i32.to_ne_bytes());
    let notification = answer(0, b"");
    for wrong in [long, short, positive, notification] {
        let mut world = World::new();
        world.say(&wrong).await;
        let end = world.end.await.expect("task");
        assert!(matches!(&end, Err(e @ FilesError::Answer) if e.is_breach()), "{end:?}");
    }
}

#[tokio::test]
async fn the_guests_end_is_the_end() {
    let World { kernel: _kernel, input: _input, output, end } = World::new();
    drop(output);
    let end = end.await.expect("task");
    assert!(matches!(&end, Err(e @ FilesError::Ended) if !e.is_breach()), "{end:?}");
}

#[tokio::test]
async fn what_is_not_answered_fails() {
    let mut world = World::new();
    world.asked().await;
    let begin = Instant::now();
    assert_eq!(world.told().await, message::refusal(4, Errno::IO));
    assert!(begin.elapsed() >= DEADLINE && begin.elapsed() < DEADLINE * 2);
    // What comes too late is for nobody, and the next question is answered.
    world.ask(&message(1, 6));
    world.asked().await;
    world.say(&[answer(4, b"late"), answer(6, b"six")].concat()).await;
    assert_eq!(world.told().await, answer(6, b"six"));
}
