//! Work inside another network namespace, on a thread of its own: a namespace belongs to a thread, and one that has entered
//! another must not serve anybody else.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use rtnetlink::Handle;
use tokio::sync::oneshot;

use super::NetworkError;

/// A network namespace, held by a descriptor: it stays what it is when its path goes.
#[derive(Clone, Debug)]
pub struct Netns {
    path: Arc<Path>,
    file: Arc<File>,
}

impl Netns {
    /// Opens a namespace.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`], and [`NetworkError::Host`] for the one that this process is in.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let failed = |source| NetworkError::Namespace { what: "open", path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let id = |file: &File| rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino)).map_err(Into::into);
        let own = File::open("/proc/self/ns/net").map_err(failed)?;
        if id(&file).map_err(failed)? == id(&own).map_err(failed)? {
            return Err(NetworkError::Host(path.to_owned()));
        }
        Ok(Self { path: path.into(), file: Arc::new(file) })
    }

    /// A path by which this process reaches it for as long as the value lives.
    #[cfg(test)]
    pub fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Runs `work` inside, with a netlink connection of there.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`], and those of `work`.
    pub async fn run<T, F>(&self, work: F) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        F: AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        let netns = self.clone();
        let thread = move || {
            // Whoever asked may have gone away.
            let _ = answer.send(netns.inside(work));
        };
        std::thread::Builder::new().name("netns".into()).spawn(thread).map_err(self.failed("work in"))?;
        // A thread that panics has said so.
        result.await.map_err(|_| self.failed("work in")(std::io::ErrorKind::Interrupted.into()))?
    }

    /// [`Netns::run`] for those who may block.
    ///
    /// # Errors
    /// As there.
    pub fn run_blocking<T, F>(&self, work: F) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        F: AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send + 'static,
    {
        let netns = self.clone();
        let thread = std::thread::Builder::new().name("netns".into()).spawn(move || netns.inside(work));
        let thread = thread.map_err(self.failed("work in"))?;
        thread.join().unwrap_or_else(|_| Err(self.failed("work in")(std::io::ErrorKind::Interrupted.into())))
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(std::io::Error) -> NetworkError {
        let path = PathBuf::from(&*self.path);
        move |source| NetworkError::Namespace { what, path, source }
    }

    /// The thread's whole life.
    fn inside<T>(&self, work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError>) -> Result<T, NetworkError> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| self.failed("enter")(e.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        runtime.map_err(self.failed("work in"))?.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(self.failed("work in"))?;
            tokio::spawn(connection);
            work(handle).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_namespace_is_refused() {
        let path = Path::new("/proc/self/ns/net");
        assert!(matches!(Netns::open(path), Err(NetworkError::Host(_))));
        let missing = Netns::open(Path::new("/nonexistent")).expect_err("missing");
        assert_eq!(missing.to_string(), "open network namespace /nonexistent");
        let file = Netns::open(Path::new("/proc/self/ns/mnt")).expect("open");
        let error = file.run_blocking(async |_| Ok(())).expect_err("no network namespace");
        assert_eq!(error.to_string(), "enter network namespace /proc/self/ns/mnt");
    }
}
