//! What a guest sends on a stream: what is read can be written again to the same bytes, and its lengths are bounded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacelle_protocol::stream::{
    ANSWER_LEN, Answer, HEADER_LEN, Header, MAX_DATA, PREAMBLE_LEN, Preamble, parse_stream_uri, stream_uri,
};

fuzz_target!(|data: &[u8]| {
    if let Some(bytes) = data.first_chunk::<PREAMBLE_LEN>()
        && let Ok(preamble) = Preamble::decode(bytes)
    {
        assert_eq!(preamble.encode(), *bytes);
        let _ = preamble.status();
    }
    if let Some(bytes) = data.first_chunk::<ANSWER_LEN>() {
        let _ = Answer::check(bytes);
    }
    let mut rest = data;
    while let Some((bytes, payload)) = rest.split_first_chunk::<HEADER_LEN>() {
        let Ok(header) = Header::decode(bytes) else { break };
        assert_eq!(header.encode(), *bytes);
        assert!(header.len as usize <= MAX_DATA);
        rest = payload.get(header.len as usize..).unwrap_or_default();
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(Some(id)) = parse_stream_uri(text)
    {
        assert_eq!(parse_stream_uri(&stream_uri(id)), Ok(Some(id)));
    }
});
