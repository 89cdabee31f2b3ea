//! The streams of a process that does not exist.

use std::io;

use nacelle_protocol::stream::{
    ANSWER_LEN, Answer, Header, Kind, MAX_DATA, Preamble, STREAM_PORT, credit_frame, parse_stream_uri,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{Connection, Dial, doors};

/// Plays what the behaviour has to do with streams: with the container's own, which `stdin` and `stdout` name, or others.
pub async fn play(name: &'static str, dial: Dial, stdin: String, stdout: String) -> io::Result<()> {
    match name {
        "guesses-streams" => {
            for guess in 0..5000 {
                // Refused, as nobody expects it.
                let _ = open(&dial, Preamble::new(Kind::Stream, guess)).await;
            }
            Ok(())
        }
        "dials-streams-for-ever" => loop {
            drop(dial(STREAM_PORT).await?);
            tokio::task::yield_now().await;
        },
        "stream-of-another-kind" => {
            let own = id(&stdout)?;
            loop {
                let _ = open(&dial, Preamble::new(Kind::Rpc, own)).await;
            }
        }
        "streams-half-open" => doors::hold(&dial, STREAM_PORT, 2000).await,
        "stream-forges-credit" => {
            let mut stream = open(&dial, Preamble::new(Kind::Stream, id(&stdin)?)).await?;
            stream.write_all(&credit_frame(u32::MAX)).await?;
            linger(stream).await
        }
        _ => {
            let Ok(own) = id(&stdout) else { return Ok(()) };
            output(name, open(&dial, Preamble::new(Kind::Stream, own)).await?).await
        }
    }
}

/// Plays what the behaviour has to do with an archive of what a container has written.
pub async fn export(name: &'static str, dial: Dial, stream: u64) -> io::Result<()> {
    let archive = match name {
        "export-never-dials" => return Ok(()),
        "export-of-garbage" => vec![0x55; 4096],
        "export-out-of-the-root" => entry("../../escaped"),
        "export-below-a-device" => [entry("device/below"), vec![0; 1024]].concat(),
        // Nothing, and the end of the archive.
        _ => vec![0; 1024],
    };
    let mut stream = open(&dial, Preamble::new(Kind::Stream, stream)).await?;
    stream.write_all(&Header::data(archive.len() as u32).encode()).await?;
    stream.write_all(&archive).await?;
    if name != "export-without-an-end" {
        stream.write_all(&Header::EOF.encode()).await?;
    }
    linger(stream).await
}

/// The header of an empty file in a tar archive.
fn entry(name: &str) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    // Mode, owner, group, size and time, in octal digits; the checksum counts as blanks while it is computed.
    [(100, "0000644"), (108, "0000000"), (116, "0000000"), (124, "00000000000"), (136, "00000000000")]
        .into_iter()
        .for_each(|(at, digits)| put(at, digits));
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\u{0}00");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

fn id(uri: &str) -> io::Result<u64> {
    let id = parse_stream_uri(uri).map_err(io::Error::other)?;
    id.ok_or_else(|| io::Error::other("there is no such stream"))
}

async fn open(dial: &Dial, preamble: Preamble) -> io::Result<Box<dyn Connection>> {
    let mut connection = dial(STREAM_PORT).await?;
    connection.write_all(&preamble.encode()).await?;
    let mut answer = [0; ANSWER_LEN];
    connection.read_exact(&mut answer).await?;
    Answer::check(&answer).map_err(io::Error::other)?;
    Ok(connection)
}

async fn linger(mut stream: Box<dyn Connection>) -> io::Result<()> {
    stream.read_to_end(&mut Vec::new()).await.map(drop)
}

async fn output(name: &'static str, mut stream: Box<dyn Connection>) -> io::Result<()> {
    match name {
        "stream-beyond-credit" => loop {
            stream.write_all(&Header::data(MAX_DATA as u32).encode()).await?;
            stream.write_all(&[b'x'; MAX_DATA]).await?;
        },
        "stream-of-garbage" => stream.write_all(&[0xee; 64]).await?,
        "stream-gives-credit-for-output" => stream.write_all(&credit_frame(1)).await?,
        "stream-without-an-end" => stream.write_all(&Header::data(1000).encode()).await?,
        "stream-cut-in-a-frame" => {
            stream.write_all(&Header::data(1000).encode()).await?;
            return stream.write_all(b"cut").await;
        }
        _ => {
            stream.write_all(&Header::data(6).encode()).await?;
            stream.write_all(b"hello\n").await?;
            stream.write_all(&Header::EOF.encode()).await?;
        }
    }
    linger(stream).await
}
