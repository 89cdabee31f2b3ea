//! What the slow steps tell whoever listens (C15).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::sync::{Arc, Mutex};

use nacelle_rootfs::patch::{LowerImage, Sources, build, decode};
use nacelle_rootfs::tar::{Hashing, convert};
use nacelle_rootfs::{Cache, Limits, Lower, Mount, plan, upper};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

type Fields = BTreeMap<&'static str, String>;

/// Keeps every span with its fields.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Vec<(&'static str, Fields)>>>);

struct Into<'a>(&'a mut Fields);

impl Visit for Into<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.target().starts_with("nacelle_rootfs")
    }

    fn new_span(&self, span: &Attributes) -> Id {
        let mut fields = Fields::new();
        span.record(&mut Into(&mut fields));
        assert_eq!(*span.metadata().level(), Level::DEBUG);
        let mut spans = self.0.lock().unwrap();
        spans.push((span.metadata().name(), fields));
        Id::from_u64(spans.len() as u64)
    }

    fn record(&self, span: &Id, values: &Record) {
        let index = usize::try_from(span.into_u64()).unwrap() - 1;
        values.record(&mut Into(&mut self.0.lock().unwrap()[index].1));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// The spans of some work, in their order; durations are there and left out.
fn spans(work: impl FnOnce()) -> Vec<String> {
    let listener = Listener::default();
    tracing::subscriber::with_default(listener.clone(), work);
    let spans = listener.0.lock().unwrap();
    let tell = |(name, fields): &(&'static str, Fields)| {
        let mut fields = fields.clone();
        fields.remove("took_us").unwrap().parse::<u64>().unwrap();
        let fields: Vec<_> = fields.iter().map(|(key, value)| format!("{key}={value}")).collect();
        format!("{name} {}", fields.join(" "))
    };
    spans.iter().map(tell).collect()
}

// C15
#[test]
fn steps_tell_counts_and_durations() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir_all(path("layer/etc")).unwrap();
    fs::create_dir_all(path("scratch")).unwrap();
    fs::write(path("layer/etc/hosts"), "12345").unwrap();
    symlink("hosts", path("layer/etc/link")).unwrap();
    fs::write(path("layer/etc/.wh.gone"), "").unwrap();
    fs::write(path("layer/etc/.wh..wh..opq"), "").unwrap();
    let layer = path("layer").display().to_string();

    let cache = Cache::open(&path("root"), Limits::default()).unwrap();
    let mount = Mount { kind: "bind".into(), source: layer.clone(), options: vec!["ro".into()], ..Mount::default() };
    let root = plan::plan(&[mount]).unwrap();
    assert!(matches!(root.lowers[..], [Lower::Snapshot(_)]));
    let acquire = || cache.acquire_all(&root, &path("scratch"), 1).map(drop).unwrap();
    let told = format!("layer.convert bytes=5 files=5 markers=2 source={layer}");
    assert_eq!(spans(acquire), [told]);
    assert_eq!(spans(acquire), [""; 0], "a layer that is there is no work");

    let archive = [0; 1024];
    let image = File::options().read(true).write(true).create_new(true).open(path("image")).unwrap();
    let converted = spans(|| {
        convert(&archive[..], &image, &Limits::default(), Hashing::Skip).unwrap();
    });
    assert_eq!(converted, ["layer.convert bytes=0 files=1 markers=0 source=an archive"]);

    let patches = |json: &str| {
        let list = decode(json.as_bytes(), &Limits::default()).unwrap();
        let lowers = [LowerImage::open(&path("image")).unwrap()];
        spans(|| drop(build(&list, &lowers, &Sources::default(), &Limits::default(), &path("patches"))))
    };
    let two = r#"[{"kind":"text","path":"/a/b","content":"123"},{"kind":"mkdir","path":"/c"}]"#;
    assert_eq!(patches(two), ["patch.apply bytes=3 files=4 markers=0 patches=2"]);
    let bad = r#"[{"kind":"append","path":"/none","content":""}]"#;
    assert_eq!(patches(bad), ["patch.apply patches=1"], "what failed has no counts");
    assert_eq!(patches("[]"), [""; 0]);

    for (name, made) in [("first", true), ("second", false)] {
        let disk = path(name).display().to_string();
        let told = spans(|| upper::create(&path("root"), &path(name), 64 << 20).unwrap());
        assert_eq!(told, [format!("upper.build bytes={} disk={disk} template={made}", 64 << 20)]);
    }
}
