//! Disk images of the node's as roots and as volumes of containers, and roots that only the node can mount.

use std::{fs, path::PathBuf};

use nacelle_tests::{
    command::{Cmd, Finished, eventually, patience},
    grpc::Message,
    node::{BUSYBOX, Container, Mount, Node},
};
use serde_json::json;

use crate::Case;

const NO_DISKS: &str = "it has no disks of its own";

pub const CASES: &[Case] = &[
    Case::only_nacelle("volumes_of_every_format", volumes_of_every_format, NO_DISKS),
    Case::only_nacelle("what_a_volume_is_not", what_a_volume_is_not, NO_DISKS),
    Case::only_nacelle("one_writer", one_writer, NO_DISKS),
    Case::only_nacelle("an_image_that_leads_astray", an_image_that_leads_astray, NO_DISKS),
    Case::only_nacelle("a_root_on_a_disk", a_root_on_a_disk, NO_DISKS),
    Case::only_nacelle("roots_by_annotation", roots_by_annotation, NO_DISKS),
    Case::only_nacelle("volumes_by_annotation", volumes_by_annotation, NO_DISKS),
    Case::only_nacelle("devices_of_the_node", devices_of_the_node, NO_DISKS),
    Case::only_nacelle("containers_of_a_pod_share_its_disks", containers_of_a_pod_share_its_disks, NO_DISKS),
    Case::only_nacelle("a_root_that_the_node_mounts", a_root_that_the_node_mounts, NO_DISKS),
];

/// A new ext4 image with the files of a directory in it.
fn image(node: &Node, name: &str, files: &str) -> PathBuf {
    let image = node.path(name);
    // What an earlier test left may be open in a VMM that is on its way out.
    fs::remove_file(&image).ok();
    let path = image.display().to_string();
    Cmd::new("mkfs.ext4").args(["-q", "-d", files, &path, "64M"]).ok();
    image
}

/// The same with one file that says `word`.
fn said(node: &Node, name: &str, word: &str) -> PathBuf {
    let files = node.path(format!("{name}.files"));
    fs::create_dir_all(&files).expect("make a directory");
    fs::write(files.join("said"), format!("{word}\n")).expect("write a file");
    image(node, name, files.to_str().expect("text"))
}

/// Content of a file on an image that nobody has mounted.
fn on_disk(image: &std::path::Path, file: &str) -> String {
    Cmd::new("debugfs").args(["-R", &format!("cat {file}")]).args([image]).ok().text()
}

fn qemu_img(args: &[&str]) {
    Cmd::new("qemu-img").args(args).ok();
}

/// `ctr run` with one disk at /d.
fn with_disk(node: &Node, image: &std::path::Path, options: &str, script: &str) -> Finished {
    let mount = format!("type=nacelle.disk,src={},dst=/d,options={options}", image.display());
    node.run(&["--rm", "--mount", &mount], BUSYBOX, &["sh", "-c", script]).run()
}

/// B1, B8, B13, B23.
fn volumes_of_every_format(node: &Node) {
    let script = "cat /d/said; echo new >/d/new; grep ' /d ' /proc/mounts | cut -d' ' -f3,4";
    let raw = said(node, "disk.img", "raw");
    let run = with_disk(node, &raw, "rw", script).expect(0);
    assert!(run.text().starts_with("raw\next4 rw,nosuid,nodev,"), "{run}");
    assert_eq!(on_disk(&raw, "new"), "new");
    let run =
        with_disk(node, &raw, "ro:fstype=ext4:noexec", "touch /d/x; cp /bin/busybox /tmp/b; cat /d/new").expect(0);
    assert!(run.text().ends_with("new"), "{run}");

    // What it is based on lies beside it, is named relatively, and is not written.
    let base = said(node, "base.raw", "base");
    let qcow = node.path("top.qcow2");
    fs::remove_file(&qcow).ok();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", qcow.to_str().expect("text")]);
    let run = with_disk(node, &qcow, "rw", script).expect(0);
    assert!(run.text().starts_with("base\next4 rw,nosuid,nodev,"), "{run}");
    assert_eq!(with_disk(node, &qcow, "ro", "cat /d/new").expect(0).text(), "new");
    assert_eq!(on_disk(&base, "new"), "");

    let flat = said(node, "disk-flat.vmdk", "flat");
    let vmdk = node.path("disk.vmdk");
    let sectors = fs::metadata(&flat).expect("an image").len() / 512;
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
         RW {sectors} FLAT \"disk-flat.vmdk\" 0\n"
    );
    fs::write(&vmdk, descriptor).expect("write a descriptor");
    assert_eq!(with_disk(node, &vmdk, "ro", "cat /d/said").expect(0).text(), "flat");
    with_disk(node, &vmdk, "rw", "true").expect_failure(&["vmdk images can only be read"]);
}

/// B6, B9, B19, B21.
fn what_a_volume_is_not(node: &Node) {
    let raw = said(node, "disk.img", "raw");
    let refused = |options: &str, words: &[&str]| with_disk(node, &raw, options, "true").expect_failure(words);
    refused("size=5", &["/d", "size goes with tmpfs volumes alone"]);
    refused("fstype=ext5", &["ext5", "volumes.filesystems"]);
    refused("format=vhd", &["vhd", "raw, qcow2 and vmdk"]);
    // Not a file system: the guest says so, and the kernel's words are there.
    let noise = node.path("noise.img");
    fs::write(&noise, vec![7; 1 << 20]).expect("write noise");
    with_disk(node, &noise, "rw", "true").expect_failure(&["mount disk disk-0", "ext4: "]);
    with_disk(node, &node.path("missing.img"), "rw", "true").expect_failure(&["missing.img", "No such file"]);
    // Whatever the container asks for, nobody gets more rights by it, and no device.
    let run = with_disk(node, &raw, "suid:dev", "grep ' /d ' /proc/mounts").expect(0);
    assert!(run.text().contains("nosuid,nodev"), "{run}");
}

fn one_writer(node: &Node) {
    let raw = said(node, "disk.img", "raw");
    let mount = |rw: &str| format!("type=nacelle.disk,src={},dst=/d,options={rw}", raw.display());
    let c = node.detached(&["--mount", &mount("rw")], BUSYBOX, &["sleep", "1000"]);
    with_disk(node, &raw, "ro", "true").expect_failure(&["disk.img", "another sandbox"]);
    assert_eq!(c.sh("echo kept >/d/kept; cat /d/said"), "raw");
    c.remove();
    // It is on the disk when the container is gone, and the disk is free.
    assert_eq!(on_disk(&raw, "kept"), "kept");
    let reader = node.detached(&["--mount", &mount("ro")], BUSYBOX, &["sleep", "1000"]);
    assert_eq!(with_disk(node, &raw, "ro", "cat /d/kept").expect(0).text(), "kept");
    with_disk(node, &raw, "rw", "true").expect_failure(&["disk.img", "another sandbox"]);
    reader.remove();
}

/// A disk may be made of files beside it, and not of any other.
fn an_image_that_leads_astray(node: &Node) {
    let [dir, qcow] = ["images", "images/top.qcow2"].map(|name| node.path(name));
    fs::create_dir_all(&dir).expect("make a directory");
    let base = said(node, "base.raw", "secret");
    let path = qcow.to_str().expect("text");
    let refused = |words: &[&str]| with_disk(node, &qcow, "rw", "true").expect_failure(words);
    for name in [base.to_str().expect("text"), "../base.raw"] {
        fs::remove_file(&qcow).ok();
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", path]);
        refused(&["backing file", "base.raw", "not allowed"]);
    }
    // With an absolute name it is found where that is allowed.
    let _allowed = node.configure(&format!("annotations.host_paths = [{:?}]", node.path("")));
    fs::remove_file(&qcow).ok();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", base.to_str().expect("text"), "-F", "raw", path]);
    assert_eq!(with_disk(node, &qcow, "rw", "cat /d/said").expect(0).text(), "secret");
}

/// The directory of an image's only layer.
fn layer(c: &Container<'_>) -> String {
    let [mount] = &c.mounts()[..] else { panic!("one mount") };
    let lower = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    lower.unwrap_or_else(|| panic!("lowerdir in {mount:?}")).to_owned()
}

fn start(node: &Node, c: &Container<'_>, mount: Mount) {
    c.create_task(&[mount]).expect("create a task on a disk");
    let start = Message::default().bytes(1, c.id());
    node.call("/containerd.services.tasks.v1.Tasks/Start", start, patience()).expect("start the task");
}

/// What containerd's blockfile snapshotter hands over.
fn a_root_on_a_disk(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let root = image(node, "root.img", &layer(&c));
    let options = ["loop", "rw"].map(str::to_owned).into();
    let mount = Mount { kind: "ext4".into(), source: root.display().to_string(), options };
    start(node, &c, mount.clone());
    let script = "echo kept >/kept; grep -c ^root /etc/passwd; grep ' / ' /proc/mounts | cut -d' ' -f3";
    assert_eq!(c.sh(script), "1\next4");
    c.remove();
    assert_eq!(on_disk(&root, "kept"), "kept");
    // Everything that another VM can find is there.
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    start(node, &c, mount);
    assert_eq!(c.sh("cat /kept; rm /kept; ls /kept 2>&1 | wc -l"), "kept\n1");
    c.remove();
    Cmd::new("e2fsck").args(["-fn"]).args([&root]).ok();
}

/// A4, B2 to B5.
fn roots_by_annotation(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let layer = layer(&c);
    c.delete();
    let root = image(node, "root.raw", &layer);
    let run = |annotations: &[&str], flags: &[&str], script: &str| {
        let annotations = annotations.iter().flat_map(|a| ["--annotation", a]).collect::<Vec<_>>();
        let flags = [&["--rm"], flags, annotations.as_slice()].concat();
        node.run(&flags, BUSYBOX, &["sh", "-c", script]).run()
    };
    let disk = format!("io.nacelle.rootfs={}", root.display());
    run(&[&disk], &[], "true").expect_failure(&["annotations.allow"]);
    let allow =
        json!(["io.nacelle.rootfs", "io.nacelle.rootfs.fstype", "io.nacelle.rootfs.upper-size", "io.nacelle.patches"]);
    let allowed = format!("annotations.allow = {allow}\n");
    {
        let _forbidden = node.configure(&allowed);
        run(&[&disk], &[], "true").expect_failure(&["io.nacelle.rootfs", "annotations.host_paths"]);
    }
    let _configured = node.configure(&format!("{allowed}annotations.host_paths = [{:?}, {layer:?}]", node.path("")));
    let script = "echo kept >/kept; grep ' / ' /proc/mounts | cut -d' ' -f3";
    assert_eq!(run(&[&disk], &[], script).expect(0).text(), "ext4");
    assert_eq!(on_disk(&root, "kept"), "kept");
    let script = "touch /more 2>&1; cat /kept";
    let said = run(&[&disk], &["--read-only"], script).expect(0).text();
    assert!(said.ends_with("Read-only file system\nkept"), "{said}");
    // A directory is converted, and never changed.
    let directory = format!("io.nacelle.rootfs={layer}");
    assert_eq!(run(&[&directory], &[], "echo kept >/kept; cat /kept").expect(0).text(), "kept");
    assert!(!std::path::Path::new(&layer).join("kept").exists());

    let words = ["io.nacelle.rootfs", "rootfs.upper-size", "image"];
    run(&[&disk, "io.nacelle.rootfs.upper-size=1Gi"], &[], "true").expect_failure(&words);
    let patch = r#"io.nacelle.patches=[{"kind":"mkdir","path":"/x"}]"#;
    run(&[&disk, patch], &[], "true").expect_failure(&["io.nacelle.rootfs", "patches"]);
    run(&["io.nacelle.rootfs.fstype=ext4"], &[], "true").expect_failure(&["rootfs.fstype", "disk"]);
    run(&["io.nacelle.rootfs=alpine"], &[], "true").expect_failure(&["alpine", "nacelle pulls none"]);
}

/// B11, B12, B17, B18, B26.
fn volumes_by_annotation(node: &Node) {
    let (raw, dir) = (said(node, "disk.raw", "raw"), node.path("disk.raw.files"));
    let nacelle = |args: &[&str]| {
        let data = node.path("nacelle").display().to_string();
        Cmd::new(node.shim_program().with_file_name("nacelle")).args(["volume", "--data-dir", &data]).args(args)
    };
    let list = json!([
        { "type": "DiskImage", "host": raw, "guest": "/disk", "format": "Raw", "options": { "readonly": true } },
        { "type": "Bind", "host": dir, "guest": "/bind", "options": { "readonly": true } },
        { "type": "Named", "name": "kept", "guest": "/named" },
        { "type": "Tmpfs", "guest": "/memory", "size_mib": 1, "options": { "noexec": true } },
    ]);
    let annotation = |list: &serde_json::Value| format!("io.nacelle.volumes={list}");
    let run = |list: &serde_json::Value, script: &str| {
        node.run(&["--rm", "--annotation", &annotation(list)], BUSYBOX, &["sh", "-c", script]).run()
    };
    let _configured = node.configure(&format!(
        "annotations.allow = [\"io.nacelle.volumes\"]\nannotations.host_paths = [{:?}]",
        node.path("")
    ));
    run(&list, "true").expect_failure(&["kept", "nacelle volume create"]);
    nacelle(&["create", "kept"]).ok();
    let script = "cat /disk/said /bind/said; touch /disk/x /bind/x 2>/dev/null; echo named >/named/file; \
                  head -c 2m /dev/zero >/memory/x 2>/dev/null; stat -c %s /memory/x; \
                  cp /bin/busybox /memory/busybox 2>/dev/null; /memory/busybox true 2>/dev/null || echo no";
    assert_eq!(run(&list, script).expect(0).text(), "raw\nraw\n1048576\nno");
    let c = node.detached(&["--annotation", &annotation(&list)], BUSYBOX, &["sleep", "1000"]);
    assert_eq!(c.sh("cat /named/file"), "named");
    nacelle(&["rm", "kept"]).run().expect_failure(&["kept", "in use"]);
    c.remove();
    nacelle(&["rm", "kept"]).ok();
    let policy = json!([{ "type": "Bind", "host": dir, "guest": "/bind", "stat_virt": "strict" }]);
    run(&policy, "true").expect_failure(&["io.nacelle.volumes", "stat-virt"]);
    let twice = json!([{ "type": "Tmpfs", "guest": "/a" }, { "type": "Tmpfs", "guest": "/a/" }]);
    run(&twice, "true").expect_failure(&["/a", "already"]);
}

/// What the pod's annotations name is there for all of its containers; what one alone names comes too late.
fn containers_of_a_pod_share_its_disks(node: &Node) {
    let (raw, other) = (said(node, "disk.raw", "raw"), said(node, "other.raw", "other"));
    let _configured = node.configure(&format!(
        "annotations.allow = [\"io.nacelle.volumes\"]\nannotations.host_paths = [{:?}]",
        node.path("")
    ));
    let list = |image: &std::path::Path| {
        let disk = json!([{ "type": "DiskImage", "host": image, "guest": "/d", "format": "Raw", "fstype": "ext4" }]);
        format!("io.nacelle.volumes={disk}")
    };
    let mut pod = node.annotated_pod(&[BUSYBOX, BUSYBOX], &[&list(&raw)]);
    let (second, first) = (pod.pop().expect("second"), pod.pop().expect("first"));
    assert_eq!(first.sh("cat /d/said; echo shared >/d/file"), "raw");
    assert_eq!(second.sh("cat /d/file; ls /sys/block | grep -c '^vd'"), "shared\n3");
    first.remove();
    assert_eq!(second.sh("cat /d/file; echo more >>/d/file"), "shared");
    let sandbox = pod.pop().expect("sandbox");
    let pair = |name: &str, value: &str| format!("io.kubernetes.cri.{name}={value}");
    let (kind, of) = (pair("container-type", "container"), pair("sandbox-id", sandbox.id()));
    let annotation = list(&other);
    let flags = ["--rm", "--annotation", &kind, "--annotation", &of, "--annotation", &annotation];
    let words = ["other.raw", "the pod's own annotations have to name it"];
    node.run(&flags, BUSYBOX, &["true"]).run().expect_failure(&words);
    second.remove();
    sandbox.remove();
    assert_eq!(on_disk(&raw, "file"), "shared\nmore");
}

/// A loop device over an image, for as long as it lives.
struct Loop(String);

impl Loop {
    fn new(image: &std::path::Path) -> Self {
        Self(Cmd::new("losetup").args(["--find", "--show"]).args([image]).ok().text())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Cmd::new("losetup").args(["--detach", &self.0]).run();
        // It goes when nobody has it open any more. What stays is found by the test's end.
        eventually(patience(), || {
            let list = Cmd::new("losetup").args(["--list", "--noheadings"]).run().text();
            (!list.contains(&self.0)).then_some(())
        });
    }
}

/// Block devices of the node's: a volume, and a root as containerd's devmapper snapshotter hands it over.
fn devices_of_the_node(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let root = image(node, "root.img", &layer(&c));
    let device = Loop::new(&root);
    let mount = Mount { kind: "ext4".into(), source: device.0.clone(), options: vec!["rw".into()] };
    start(node, &c, mount.clone());
    assert_eq!(c.sh("echo kept >/kept; grep ' / ' /proc/mounts | cut -d' ' -f3"), "ext4");
    // Nobody mounts it on the node meanwhile, and who has mounted it there keeps it.
    let target = node.path("mounted");
    fs::create_dir_all(&target).expect("make a directory");
    let mounted = || Cmd::new("mount").args([&device.0]).args([&target]);
    mounted().run().expect_failure(&[&device.0, "blockdev"]);
    c.remove();
    let volume = |options: &str, script: &str| {
        let mount = format!("type=nacelle.disk,src={},dst=/d,options={options}", device.0);
        node.run(&["--rm", "--mount", &mount], BUSYBOX, &["sh", "-c", script]).run()
    };
    assert_eq!(volume("rw", "cat /d/kept; echo more >/d/more").expect(0).text(), "kept");
    assert_eq!(volume("ro", "cat /d/more; touch /d/x 2>/dev/null || echo no").expect(0).text(), "more\nno");
    mounted().ok();
    volume("rw", "true").expect_failure(&[&device.0, "has mounted it"]);
    Cmd::new("umount").args([&target]).ok();
    drop(device);
    assert_eq!(on_disk(&root, "more"), "more");
}

/// C2: what nacelle does not take apart, such as what btrfs, zfs or fuse-overlayfs hand over.
fn a_root_that_the_node_mounts(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let [mut mount]: [Mount; 1] = c.mounts().try_into().unwrap_or_else(|_| panic!("one mount"));
    mount.options.push("metacopy=on".into());
    start(node, &c, mount.clone());
    assert_eq!(c.sh("echo new >/new; cat /new; grep -c ^root /etc/passwd"), "new\n1");
    c.remove();
    let _none = node.configure("rootfs.fallback = \"none\"");
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let text = c.create_task(&[mount]).expect_err("refused").to_string();
    assert!(text.contains("metacopy=on") && text.contains("not supported"), "{text}");
    c.delete();
}
