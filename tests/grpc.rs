//! The few calls of containerd's API for which `ctr` has no command: change a container's spec, update a task's
//! resources, wait for a task. One call, one connection; messages are written field by field.

use std::{error::Error, path::Path, time::Duration};

use h2::client;
use http::{Request, Version};
use tokio::{net::UnixStream, runtime, time::timeout};

/// What can go wrong: the status that containerd answered, or the connection.
pub type CallError = Box<dyn Error + Send + Sync>;

/// A protocol buffers message under construction.
#[derive(Default)]
pub struct Message(Vec<u8>);

impl Message {
    /// Adds a field that holds bytes, text or a message.
    pub fn bytes(mut self, field: u32, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    /// Adds a field that holds a number.
    pub fn number(mut self, field: u32, value: u64) -> Self {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    /// Adds a field that holds another message.
    pub fn message(self, field: u32, value: Self) -> Self {
        self.bytes(field, value.0)
    }

    /// `google.protobuf.Any`.
    pub fn any(type_url: &str, value: &[u8]) -> Self {
        Self::default().bytes(1, type_url).bytes(2, value)
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// The number in a field of a message; 0, as absent, when it is not there.
///
/// # Errors
/// The bytes are no message.
pub fn number(message: &[u8], field: u32) -> Result<u64, CallError> {
    let mut input = protobuf::CodedInputStream::from_bytes(message);
    let mut found = 0;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match (tag >> 3, tag & 7) {
            (n, 0) if n == field => found = input.read_raw_varint64()?,
            (_, 0) => drop(input.read_raw_varint64()?),
            (_, 2) => drop(input.read_bytes()?),
            (n, kind) => return Err(format!("field {n} has kind {kind}").into()),
        }
    }
    Ok(found)
}

/// The bytes in a field of a message, the last where there are several.
///
/// # Errors
/// The bytes are no message, or the field is not there.
pub fn bytes(message: &[u8], field: u32) -> Result<Vec<u8>, CallError> {
    all(message, field)?.pop().ok_or_else(|| format!("field {field} is not there").into())
}

/// The bytes in a field of a message, as often as it is there.
///
/// # Errors
/// The bytes are no message.
pub fn all(message: &[u8], field: u32) -> Result<Vec<Vec<u8>>, CallError> {
    let mut input = protobuf::CodedInputStream::from_bytes(message);
    let mut found = Vec::new();
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match (tag >> 3, tag & 7) {
            (n, 2) if n == field => found.push(input.read_bytes()?),
            (_, 0) => drop(input.read_raw_varint64()?),
            (_, 2) => drop(input.read_bytes()?),
            (n, kind) => return Err(format!("field {n} has kind {kind}").into()),
        }
    }
    Ok(found)
}

/// Calls a method such as `/containerd.services.tasks.v1.Tasks/Wait` in a namespace of the containerd behind `socket`.
///
/// # Errors
/// The message of the status, or what is wrong with the connection; also when there is no answer within the time.
pub fn call(
    socket: &Path,
    namespace: &str,
    method: &str,
    message: Message,
    within: Duration,
) -> Result<Vec<u8>, CallError> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        timeout(within, unary(socket, namespace, method, message))
            .await
            .map_err(|_| format!("{method}: no answer within {within:?}"))?
    })
}

async fn unary(socket: &Path, namespace: &str, method: &str, message: Message) -> Result<Vec<u8>, CallError> {
    let (mut sender, connection) = client::handshake(UnixStream::connect(socket).await?).await?;
    let driver = tokio::spawn(connection);
    let request = Request::post(format!("http://containerd{method}"))
        .version(Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("containerd-namespace", namespace)
        .body(())?;
    let (response, mut body) = sender.send_request(request, false)?;
    // A frame of gRPC: not compressed, length, message.
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.0.len())?.to_be_bytes());
    frame.extend(message.0);
    body.send_data(frame.into(), true)?;

    let (head, mut stream) = response.await?.into_parts();
    let mut answer = Vec::new();
    while let Some(chunk) = stream.data().await {
        let chunk = chunk?;
        stream.flow_control().release_capacity(chunk.len())?;
        answer.extend_from_slice(&chunk);
    }
    // An answer without a message carries its status in the head.
    let trailers = stream.trailers().await?.unwrap_or(head.headers);
    driver.abort();
    let header = |name| trailers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    match header("grpc-status") {
        "0" => Ok(answer.split_off(5.min(answer.len()))),
        status => Err(format!("{method}: status {status}: {}", header("grpc-message")).into()),
    }
}
