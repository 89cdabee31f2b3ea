//! What a guest sends on its one ttrpc connection: answers and events. The first byte says how many calls are open.
#![no_main]

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use libfuzzer_sys::fuzz_target;
use nacelle_protocol::agent::Event;
use nacelle_shim::conduct::Conduct;
use nacelle_shim::guest::{clean_metrics, read_event};
use nacelle_shim::wire::Wire;
use tokio::io::{AsyncReadExt, AsyncWrite, empty, join};

/// A request without a body, as ttrpc frames it.
fn request(stream: u32) -> [u8; 10] {
    let mut frame = [0; 10];
    frame[4..8].copy_from_slice(&stream.to_be_bytes());
    frame[8] = 1;
    frame
}

fuzz_target!(|data: &[u8]| {
    let Some((open, data)) = data.split_first() else { return };
    futures::executor::block_on(async {
        let conduct = Arc::new(Conduct::default());
        // In pieces of two sizes, so that headers are torn.
        let (head, tail) = data.split_at(data.len() / 3);
        let mut wire = Wire::new(join(head.chain(tail), empty()), conduct.clone());
        for n in 0..u32::from(*open) {
            let frame = request(2 * n + 1);
            poll_fn(|cx| Pin::new(&mut wire).poll_write(cx, &frame)).await.expect("nobody misbehaves yet");
        }
        let result = wire.read_to_end(&mut Vec::new()).await;
        assert_eq!(result.is_err(), conduct.verdict().is_some());
    });
    if let Ok(event) = Event::parse_from_bytes(data) {
        let _ = read_event(event);
    }
    if let Ok(stats) = Any::parse_from_bytes(data)
        && let Ok(clean) = clean_metrics(stats)
    {
        assert!(clean.len() <= 64 << 10, "what is written anew is no longer than what was sent");
    }
});
