//! rtnetlink's requests, with names for what was asked for.

use std::io;

use futures::{Stream, TryStreamExt};
use rtnetlink::Error;

use super::NetworkError;

/// What the kernel said, without the library's words around it.
pub fn cause(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// Names a request that failed.
pub fn asked(what: impl Into<String>) -> impl FnOnce(Error) -> NetworkError {
    move |error| NetworkError::Request { what: what.into(), source: cause(error) }
}

/// All that there is of something.
///
/// # Errors
/// [`NetworkError::Request`].
pub async fn list<T>(what: &str, items: impl Stream<Item = Result<T, Error>>) -> Result<Vec<T>, NetworkError> {
    items.try_collect().await.map_err(asked(format!("list {what}")))
}
