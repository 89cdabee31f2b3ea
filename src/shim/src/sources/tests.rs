//! What annotations and mounts ask for, and what is refused.

use std::fs;

use nacelle_protocol::ids::SandboxId;
use serde_json::Value;

use super::*;
use crate::config::Origin;

fn config(dir: &Path) -> Config {
    let body = format!(
        "[rootfs]\ndir = {:?}\n[volumes]\nfilesystems = [\"ext4\"]\n[annotations]\nallow = {:?}\nhost_paths = [{:?}]\n",
        dir.join("data"),
        crate::annotations::KNOWN,
        dir.join("allowed"),
    );
    Origin { path: None, body: Some(body) }.load().expect("configuration")
}

fn bundle(dir: &Path, mounts: Value, annotations: Value) -> Bundle {
    let json = json!({
        "ociVersion": "1.1.0",
        "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["sh"] },
        "root": { "path": "rootfs" },
        "mounts": mounts,
        "linux": { "namespaces": [{ "type": "network" }, { "type": "ipc" }] },
        "annotations": annotations,
    });
    Bundle::parse(dir, json.to_string().as_bytes()).expect("bundle")
}

fn read(config: &Config, bundle: &Bundle) -> Result<Sources, SourcesError> {
    let wishes = config.annotations.read(bundle.annotations()).expect("annotations");
    Sources::read(bundle, &wishes, config)
}

fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
    fs::write(&path, [0; 4096]).expect("write");
    path.canonicalize().expect("real")
}

#[test]
fn volumes_take_the_places_of_their_mounts() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = config(dir.path());
    let disk = image(dir.path(), "anywhere/disk.img");
    Store::new(&config.data_dir).create("cache").expect("create");
    let mounts = json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/data", "type": "nacelle.disk", "source": disk, "options": ["ro", "fstype=ext4"] },
        { "destination": "/cache", "type": "nacelle.named", "source": "cache", "options": ["noexec"] },
        { "destination": "/run", "type": "tmpfs", "source": "tmpfs" },
    ]);
    let list = json!([{ "type": "Tmpfs", "guest": "/scratch", "size_mib": 7 }]).to_string();
    let bundle = bundle(dir.path(), mounts, json!({ VOLUMES: list }));
    let sources = read(&config, &bundle).expect("sources");
    let wanted = sources.disks(None);
    assert_eq!(wanted.iter().map(|w| (&w.path, w.read_only)).collect::<Vec<_>>(), [(&disk, true)]);
    let disks = Disks::attach(&wanted, |_| false).expect("attach");
    let id = ContainerId::new("c1").expect("id");
    let mut translation = spec::translate(&bundle.spec, &id, None::<&SandboxId>).expect("translate");
    let holds = sources.place(&id, &mut translation, &disks).expect("place");
    assert_eq!((holds.len(), translation.disks.len()), (1, 1));
    let mounts = translation.spec["mounts"].as_array().expect("mounts");
    let order: Vec<_> = mounts.iter().map(|m| m["destination"].as_str().expect("text")).collect();
    assert_eq!(order, ["/proc", "/data", "/cache", "/run", "/scratch"]);
    assert_eq!(mounts[1]["source"], "/run/nacelle/disks/disk-0");
    assert_eq!(mounts[1]["options"], json!(["bind", "rprivate", "nosuid", "nodev", "ro"]));
    assert_eq!(mounts[2]["source"], "/run/nacelle/volumes/c1-0");
    assert_eq!(mounts[2]["options"], json!(["rbind", "rprivate", "nosuid", "nodev", "rw", "noexec"]));
    assert_eq!(translation.volumes[0].source, config.data_dir.join("volumes/cache/data"));
    assert_eq!(mounts[4]["options"], json!(["size=7m", "nosuid", "nodev", "rw"]));
}

#[test]
fn what_annotations_may_not_name_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = config(dir.path());
    let outside = image(dir.path(), "outside/disk.raw");
    let inside = image(dir.path(), "allowed/disk.raw");
    let refused = |annotations: Value| {
        read(&config, &bundle(dir.path(), json!([{ "destination": "/run/", "type": "tmpfs" }]), annotations))
            .expect_err("refused")
            .to_string()
    };
    let disk = |host: &Path| json!([{ "type": "DiskImage", "host": host, "guest": "/d", "format": "Raw" }]).to_string();
    let hint = "there is no such file below annotations.host_paths";
    assert!(refused(json!({ VOLUMES: disk(&outside) })).ends_with(hint));
    assert!(refused(json!({ ROOTFS: outside })).ends_with(hint));
    let bind = json!([{ "type": "Bind", "host": "/etc", "guest": "/d" }]).to_string();
    assert!(refused(json!({ VOLUMES: bind })).ends_with(hint));
    let twice = json!([{ "type": "Tmpfs", "guest": "/run" }]).to_string();
    assert!(refused(json!({ VOLUMES: twice })).ends_with("the container has a mount at /run already"));
    let xfs = json!({ ROOTFS: inside, ROOTFS_FSTYPE: "xfs" });
    assert!(refused(xfs).ends_with("file system \"xfs\" is not one of volumes.filesystems: ext4"));
    assert!(refused(json!({ ROOTFS: "alpine:3" })).ends_with("nacelle pulls none"));
    assert!(refused(json!({ ROOTFS_FSTYPE: "ext4" })).contains("rootfs.fstype goes with a disk alone"));
    let named = json!([{ "type": "Named", "name": "missing", "guest": "/d" }]).to_string();
    assert!(refused(json!({ VOLUMES: named })).contains("missing"));
}

#[test]
fn roots() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = config(dir.path());
    let disk = image(dir.path(), "allowed/root.raw");
    let mounts = [Mount { kind: "bind".into(), source: "/s/1".into(), options: vec!["ro".into()], ..Mount::default() }];
    let none = Patches::default();
    let some = Patches::read(None, Some(("list", r#"[{"kind":"mkdir","path":"/x"}]"#)), &[]).expect("patches");
    let root = |annotations: Value, patches: &Patches| {
        let bundle = bundle(dir.path(), json!([]), annotations);
        read(&config, &bundle).and_then(|sources| sources.root(&mounts, patches, &config, true))
    };
    assert!(matches!(root(json!({}), &none), Ok(Root::Layers(plan)) if !plan.lowers.is_empty()));
    let own = json!({ ROOTFS: "alpine:3", IMAGE: "alpine:3" });
    assert!(matches!(root(own, &none), Ok(Root::Layers(_))));
    let given = dir.path().join("allowed").canonicalize().expect("real");
    assert_eq!(root(json!({ ROOTFS: given }), &some).expect("a directory"), Root::Layers(of_directory(given.clone())));
    let Ok(Root::Disk(wanted)) = root(json!({ ROOTFS: disk }), &none) else { panic!("a disk") };
    assert_eq!((wanted.path, wanted.types, wanted.read_only), (disk.clone(), vec!["ext4".to_owned()], false));
    let text = root(json!({ ROOTFS: disk }), &some).expect_err("patched").to_string();
    assert!(text.contains(ROOTFS) && text.contains("patches"), "{text}");

    // The blockfile snapshotter's.
    let loops = |rw: &str| {
        let options = vec!["loop".to_owned(), rw.to_owned()];
        [Mount { kind: "ext4".into(), source: disk.display().to_string(), options, ..Mount::default() }]
    };
    let plain = read(&config, &bundle(dir.path(), json!([]), json!({}))).expect("sources");
    let of = |patches, alone| plain.root(&loops("rw"), patches, &config, alone).expect("root");
    assert!(matches!(of(&none, true), Root::Disk(wanted) if !wanted.read_only && wanted.path == disk));
    assert!(matches!(of(&none, false), Root::Whole(_)), "the VM of a pod is there already");
    assert!(matches!(of(&some, true), Root::Whole(_)), "patches need layers");
}
