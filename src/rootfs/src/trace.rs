//! What the slow steps of this crate tell whoever listens: a span each, at debug level, with what came out of it and how long it took.
//!
//! | span            | fields                                                                       |
//! |-----------------|------------------------------------------------------------------------------|
//! | `layer.convert` | `source`, `files`, `bytes`, `markers`, `took_us`                             |
//! | `patch.apply`   | `patches`, `files`, `bytes`, `markers`, `took_us`                            |
//! | `upper.build`   | `disk`, `bytes`, `template` (whether it had to be made), `took_us`           |
//!
//! `files` are inodes, `bytes` those of regular files, `markers` whiteouts and opaque directories. When nobody listens, nothing is
//! counted. A step that failed has a duration and no counts; the error is its caller's to tell.

use std::fmt::Display;
use std::path::Path;
use std::time::Instant;

use tracing::field::{Empty, display};
use tracing::span::EnteredSpan;
use tracing::{Span, debug, debug_span};

use crate::tree::{Node, Tree};

/// A step that goes on until the value is dropped.
pub(crate) struct Step {
    span: EnteredSpan,
    started: Instant,
}

impl Step {
    /// A layer becomes an image.
    pub(crate) fn layer(source: impl Display) -> Step {
        let source = display(source);
        Step::begin(debug_span!(
            "layer.convert",
            source,
            files = Empty,
            bytes = Empty,
            markers = Empty,
            took_us = Empty
        ))
    }

    /// Patches become an image.
    pub(crate) fn patches(patches: usize) -> Step {
        Step::begin(debug_span!("patch.apply", patches, files = Empty, bytes = Empty, markers = Empty, took_us = Empty))
    }

    /// A writable disk is made.
    pub(crate) fn upper(disk: &Path, bytes: u64) -> Step {
        let disk = display(disk.display());
        Step::begin(debug_span!("upper.build", disk, bytes, template = Empty, took_us = Empty))
    }

    fn begin(span: Span) -> Step {
        Step { span: span.entered(), started: Instant::now() }
    }

    /// Records what is in a tree.
    pub(crate) fn count(&self, tree: &Tree) {
        if self.span.is_disabled() {
            return;
        }
        let (mut bytes, mut markers) = (0u64, 0u64);
        for inode in &tree.inodes {
            match inode.node {
                Node::File { size, .. } => bytes = bytes.saturating_add(size),
                _ => markers += u64::from(inode.is_whiteout() || inode.is_opaque()),
            }
        }
        self.span.record("files", tree.inodes.len() as u64).record("bytes", bytes).record("markers", markers);
    }

    /// Records whether the template had to be made.
    pub(crate) fn template(&self, made: bool) {
        self.span.record("template", made);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.span.is_disabled() {
            self.span.record("took_us", u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX));
            // The usual listeners write events, and the fields of the spans that they are in.
            debug!("done");
        }
    }
}
