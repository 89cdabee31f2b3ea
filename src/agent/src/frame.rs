//! Cuts a connection into the frames of [`nacelle_protocol::stream`].

use nacelle_protocol::stream::{FrameKind, HEADER_LEN, Header, StreamError};
use tokio::io::{AsyncRead, AsyncReadExt};

/// One whole frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes of the stream.
    Data(Vec<u8>),
    /// No more bytes will come.
    Eof,
    /// Room for more bytes.
    Credit(u32),
}

/// Cuts a connection into frames. What has been read of one is kept when a wait for it is given up.
pub struct Frames<R> {
    receive: R,
    head: [u8; HEADER_LEN],
    body: Vec<u8>,
    header: Option<Header>,
    filled: usize,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// Frames of what `receive` yields.
    pub fn new(receive: R) -> Self {
        Self { receive, head: [0; HEADER_LEN], body: Vec::new(), header: None, filled: 0 }
    }

    /// The next frame; `None` when the connection ends.
    ///
    /// # Errors
    /// [`StreamError`], after which there is no telling where a frame begins.
    pub async fn next(&mut self) -> Result<Option<Frame>, StreamError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                while self.filled < HEADER_LEN {
                    match self.receive.read(&mut self.head[self.filled..]).await {
                        Ok(n @ 1..) => self.filled += n,
                        Ok(0) | Err(_) => return Ok(None),
                    }
                }
                let header = Header::decode(&self.head)?;
                self.body = vec![0; header.len as usize];
                self.filled = 0;
                *self.header.insert(header)
            }
        };
        while self.filled < self.body.len() {
            match self.receive.read(&mut self.body[self.filled..]).await {
                Ok(n @ 1..) => self.filled += n,
                Ok(0) | Err(_) => return Ok(None),
            }
        }
        self.filled = 0;
        self.header = None;
        let body = std::mem::take(&mut self.body);
        Ok(Some(match header.kind {
            FrameKind::Data => Frame::Data(body),
            FrameKind::Eof => Frame::Eof,
            FrameKind::Credit => Frame::Credit(body.try_into().map(u32::from_le_bytes).unwrap_or(0)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacelle_protocol::stream::{MAX_DATA, credit_frame};
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn frames_come_whole_however_they_arrive() {
        let mut bytes = Header::data(3).encode().to_vec();
        bytes.extend(b"abc");
        bytes.extend(credit_frame(9));
        bytes.extend(Header::EOF.encode());
        let (mut send, receive) = tokio::io::duplex(1);
        let sending = tokio::spawn(async move {
            for byte in bytes {
                send.write_all(&[byte]).await.expect("sent");
                tokio::task::yield_now().await;
            }
        });
        let mut frames = Frames::new(receive);
        let mut all = Vec::new();
        while all.len() < 3 {
            // Given up again and again, and nothing is lost.
            tokio::select! {
                biased;
                frame = frames.next() => all.extend(frame.expect("frame")),
                () = tokio::task::yield_now() => {}
            }
        }
        sending.await.expect("sent");
        assert_eq!(all, [Frame::Data(b"abc".to_vec()), Frame::Credit(9), Frame::Eof]);
        assert_eq!(frames.next().await, Ok(None));
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_is_held() {
        let head = Header { kind: FrameKind::Data, len: MAX_DATA as u32 + 1 }.encode();
        assert!(Frames::new(&head[..]).next().await.is_err());
        assert!(Frames::new(&[9; HEADER_LEN][..]).next().await.is_err());
        assert_eq!(Frames::new(&head[..3]).next().await, Ok(None), "cut short");
    }
}
