//! Before the handshake and at it: who dials, how, and what then is said on the connection for calls.

use std::io;
use std::time::Duration;

use nacelle_protocol::stream::{ANSWER_LEN, Answer, Kind, PREAMBLE_LEN, Preamble, RPC_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{Connection, Dial, answers};

/// Plays a behaviour from the beginning.
pub async fn open(name: &'static str, dial: Dial) -> io::Result<()> {
    match name {
        "never-dials" => std::future::pending().await,
        "wrong-magic" => for_ever(&dial, [0xee; PREAMBLE_LEN]).await,
        "wrong-generation" => {
            for_ever(&dial, Preamble { generation: 99, ..Preamble::new(Kind::Rpc, 0) }.encode()).await
        }
        "reconnects-for-ever" => loop {
            drop(dial(RPC_PORT).await?);
            tokio::task::yield_now().await;
        },
        "half-open" => hold(&dial, RPC_PORT, 500).await,
        _ => {
            let connection = rpc(&dial).await?;
            at_the_handshake(name, connection, dial).await
        }
    }
}

/// Says `preamble` on one connection after the other.
async fn for_ever(dial: &Dial, preamble: [u8; PREAMBLE_LEN]) -> io::Result<()> {
    loop {
        let mut connection = dial(RPC_PORT).await?;
        // The host may hang up at any point of this.
        let _ = connection.write_all(&preamble).await;
        let _ = connection.read_to_end(&mut Vec::new()).await;
    }
}

/// Opens connections and says nothing on them.
pub async fn hold(dial: &Dial, port: u32, count: usize) -> io::Result<()> {
    let mut held = Vec::new();
    while held.len() < count {
        match tokio::time::timeout(Duration::from_secs(2), dial(port)).await {
            Ok(Ok(connection)) => held.push(connection),
            // The host takes no more of them.
            Ok(Err(_)) | Err(_) => break,
        }
    }
    std::future::pending().await
}

async fn rpc(dial: &Dial) -> io::Result<Box<dyn Connection>> {
    let mut connection = dial(RPC_PORT).await?;
    connection.write_all(&Preamble::new(Kind::Rpc, 0).encode()).await?;
    let mut answer = [0; ANSWER_LEN];
    connection.read_exact(&mut answer).await?;
    Answer::check(&answer).map_err(io::Error::other)?;
    Ok(connection)
}

async fn at_the_handshake(name: &'static str, mut connection: Box<dyn Connection>, dial: Dial) -> io::Result<()> {
    match name {
        "never-reads" => std::future::pending().await,
        "never-answers" => loop {
            let mut bytes = vec![0; 4096];
            if connection.read(&mut bytes).await? == 0 {
                return Ok(());
            }
        },
        "babbles" => {
            let noise: Vec<u8> = (0..65536u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            loop {
                connection.write_all(&noise).await?;
            }
        }
        "giant-frame" => {
            connection.write_all(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0]).await?;
            loop {
                connection.write_all(&[0; 65536]).await?;
            }
        }
        "answers-unasked" => {
            let mut stream = 1000u32;
            loop {
                connection.write_all(&answers::frame(stream, answers::ANSWER, b"")).await?;
                stream = stream.wrapping_add(2);
            }
        }
        _ => answers::serve(name, connection, dial).await,
    }
}
