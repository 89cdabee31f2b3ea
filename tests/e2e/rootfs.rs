//! Root file systems and what is mounted into them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nacelle_tests::{
    command::{Cmd, patience, within},
    grpc::Message,
    node::{BUSYBOX, Container, Mount, Node},
};
use serde_json::json;

use crate::Case;

/// What containerd has no part in.
pub const PACKAGES: &[Case] = &[Case::new("packages_are_installed", packages_are_installed)];

pub const CASES: &[Case] = &[
    Case::new("writes_stay_in_the_container", writes_stay_in_the_container),
    Case::new("read_only_rootfs", read_only_rootfs),
    Case::new("bind_mount_of_a_directory", bind_mount_of_a_directory),
    Case::only_nacelle("mounts_of_the_host_arrive_later", mounts_of_the_host_arrive_later, "it looks at the VMM"),
    Case::new("bind_mount_of_a_file_hides_its_siblings", bind_mount_of_a_file_hides_its_siblings),
    Case::new("volumes_take_every_operation", volumes_take_every_operation),
    Case::new("bind_mounts_keep_owners_and_modes", bind_mounts_keep_owners_and_modes),
    Case::new("tmpfs_mount", tmpfs_mount),
    Case::new("thirty_layers", thirty_layers),
    Case::new("a_hundred_layers", a_hundred_layers),
    Case::new("a_distribution", a_distribution),
    Case::new("file_system_semantics", file_system_semantics),
    Case::new("a_full_upper_harms_nobody_else", a_full_upper_harms_nobody_else),
    Case::new("patches_by_configuration_and_annotation", patches_by_configuration_and_annotation),
    Case::new("images_that_the_snapshotter_made", images_that_the_snapshotter_made),
];

fn writes_stay_in_the_container(node: &Node) {
    let script = "echo mine >/etc/passwd; rm -r /home; mkdir /new; echo x >/new/file; cat /etc/passwd; ls /new";
    assert_eq!(node.run(&["--rm"], BUSYBOX, &["sh", "-c", script]).ok().text(), "mine\nfile");
    let script = "test ! -e /new && test -d /home && grep -c root /etc/passwd";
    assert_eq!(node.run(&["--rm"], BUSYBOX, &["sh", "-c", script]).ok().text(), "1");
}

fn read_only_rootfs(node: &Node) {
    let script =
        "touch /file 2>&1; touch /etc/passwd 2>&1; echo x >/dev/shm/file && echo shm; echo x >/dev/null && echo null";
    let text = node.run(&["--rm", "--read-only"], BUSYBOX, &["sh", "-c", script]).ok().text();
    assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
    assert!(text.ends_with("shm\nnull"), "{text}");
}

/// A directory of the node's with two files.
fn shared(node: &Node, name: &str) -> std::path::PathBuf {
    let dir = node.path(name);
    fs::create_dir_all(dir.join("below")).expect("make a directory");
    fs::write(dir.join("one"), "1\n").expect("write a file");
    fs::write(dir.join("two"), "2\n").expect("write a file");
    dir
}

fn bind_mount_of_a_directory(node: &Node) {
    let dir = shared(node, "directory");
    let mount = |options| format!("type=bind,src={},dst=/mnt/shared,options={options}", dir.display());
    let c = node.detached(&["--mount", &mount("rbind:rw")], BUSYBOX, &["sleep", "1000"]);
    assert_eq!(c.sh("cat /mnt/shared/one /mnt/shared/two; echo 3 >/mnt/shared/below/three"), "1\n2");
    assert_eq!(fs::read_to_string(dir.join("below/three")).expect("read what the container wrote"), "3\n");
    // What the node changes while the container runs is seen, contents and names alike.
    fs::write(dir.join("one"), "changed\n").expect("write a file");
    fs::write(dir.join("four"), "4\n").expect("write a file");
    fs::remove_file(dir.join("two")).expect("remove a file");
    assert_eq!(c.sh("cat /mnt/shared/one /mnt/shared/four; ls /mnt/shared"), "changed\n4\nbelow\nfour\none");
    c.remove();

    let script = "cat /mnt/shared/one; touch /mnt/shared/one 2>&1; rm /mnt/shared/one 2>&1";
    let run = node.run(&["--rm", "--mount", &mount("rbind:ro")], BUSYBOX, &["sh", "-c", script]).run();
    assert_eq!(run.text().matches("Read-only file system").count(), 2, "{run}");
    assert!(dir.join("one").exists());
}

fn mounts_of_the_host_arrive_later(node: &Node) {
    let dir = shared(node, "later");
    let mount = format!("type=bind,src={},dst=/mnt/shared,options=rbind:rslave:rw", dir.display());
    let c = node.detached(&["--mount", &mount], BUSYBOX, &["sleep", "1000"]);
    let below = dir.join("below");
    // Nobody but root may enter it, as it is with many a volume.
    Cmd::new("mount").args(["-t", "tmpfs", "-o", "mode=700", "tmpfs"]).args([&below]).ok();
    fs::write(below.join("file"), "late\n").expect("write a file");
    within(patience(), "the mount arrives with the pod's ids", || {
        let script = "cat /mnt/shared/below/file && touch /mnt/shared/below/mine";
        let said = c.exec(&[], &["sh", "-c", script]).run();
        (said.code == 0 && said.text() == "late").then_some(())
    });
    assert_eq!(fs::metadata(below.join("mine")).expect("the container made it").uid(), 0);
    Cmd::new("umount").args([&below]).ok();
    within(patience(), "the mount goes", || {
        let said = c.exec(&[], &["ls", "/mnt/shared/below"]).run();
        (said.code == 0 && said.text().is_empty()).then_some(())
    });
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", c.pid())).expect("the VMM's mounts");
    assert!(!mounts.contains("/below "), "a copy keeps what the host has unmounted:\n{mounts}");
    c.remove();
}

fn bind_mount_of_a_file_hides_its_siblings(node: &Node) {
    let dir = shared(node, "siblings");
    let mount = format!("type=bind,src={},dst=/etc/one,options=bind:rw", dir.join("one").display());
    let script = "cat /etc/one; echo written >/etc/one; find / -xdev -name two; \
                  for d in $(awk '{print $2}' /proc/mounts); do ls $d/two 2>/dev/null; done; echo done";
    let run = node.run(&["--rm", "--mount", &mount], BUSYBOX, &["sh", "-c", script]).ok();
    assert_eq!(run.text(), "1\ndone");
    assert_eq!(fs::read_to_string(dir.join("one")).expect("read the file"), "written\n");
}

fn volumes_take_every_operation(node: &Node) {
    let dir = node.path("operations");
    fs::remove_dir_all(&dir).ok();
    fs::create_dir(&dir).expect("make a directory");
    let image = node.image("debian-python");
    let mount = format!("type=bind,src={},dst=/v,options=rbind:rw", dir.display());
    // What a program may ask of a directory of the host's, and each is another call of the VMM's, which has a filter.
    let script = r#"
import fcntl, os
os.chdir("/v")
f = os.open("f", os.O_RDWR | os.O_CREAT)
g = os.open("g", os.O_RDWR | os.O_CREAT)
def links():
    os.symlink("f", "soft"); os.link("f", "hard")
    assert os.readlink("soft") == "f" and os.lstat("soft").st_nlink == 1 and os.stat("hard").st_nlink == 2
def attributes(at, **how):
    os.setxattr(at, "user.a", b"1", **how)
    assert os.getxattr(at, "user.a", **how) == b"1" and "user.a" in os.listxattr(at, **how)
    os.removexattr(at, "user.a", **how)
def holes():
    os.ftruncate(g, 1 << 20); os.pwrite(g, b"x", 1 << 19)
    assert os.lseek(g, 8192, os.SEEK_DATA) == 1 << 19 and os.lseek(g, 1 << 19, os.SEEK_HOLE) > 1 << 19
def names():
    os.mkdir("d"); os.rename("f", "d/f"); os.rename("d/f", "f"); os.rmdir("d"); os.mkfifo("p"); os.unlink("p")
for name, work in {
    "write": lambda: os.pwritev(f, [b"x" * 4096, b"y" * 4096], 0),
    "read": lambda: os.preadv(f, [bytearray(4096), bytearray(4096)], 0),
    "fsync": lambda: os.fsync(f),
    "fdatasync": lambda: os.fdatasync(f),
    "ftruncate": lambda: os.ftruncate(f, 4096),
    "truncate": lambda: os.truncate("f", 8192),
    "fallocate": lambda: os.posix_fallocate(f, 0, 65536),
    "fchmod": lambda: os.fchmod(f, 0o640),
    "fchown": lambda: os.fchown(f, 12, 34),
    "times": lambda: os.utime("f", (1, 2)),
    "times of a descriptor": lambda: os.utime(f, (3, 4)),
    "attributes": lambda: attributes("f"),
    "attributes of a descriptor": lambda: attributes(f),
    "links": links,
    "attributes of a link": lambda: os.listxattr("soft", follow_symlinks=False),
    "copy_file_range": lambda: os.copy_file_range(f, g, 4096, 0, 0),
    "holes": holes,
    "names": names,
    "lock": lambda: fcntl.lockf(f, fcntl.LOCK_EX),
    "statvfs": lambda: os.statvfs("/v").f_bsize,
    "sync": os.sync,
}.items():
    try:
        work()
    except Exception as error:
        print(name, "failed:", error)
print("done")
"#;
    let run = node.run(&["--rm", "--mount", &mount], &image, &["python3", "-c", script]).within(patience() * 2).ok();
    assert_eq!(run.text(), "done");
    let file = fs::metadata(dir.join("f")).expect("the container made it");
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o777, file.mtime()), (12, 34, 0o640, 4));
}

fn bind_mounts_keep_owners_and_modes(node: &Node) {
    let dir = shared(node, "owners");
    std::os::unix::fs::chown(dir.join("one"), Some(1000), Some(2000)).expect("change the owner");
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", dir.display());
    let c = node.created(&["--mount", &mount], BUSYBOX, &[
        "sh",
        "-c",
        "stat -c %u:%g:%a /shared/one /shared/two; touch /shared/new; chown 1234:5678 /shared/new; chmod 4750 /shared/new; \
         ln -s one /shared/link; ln /shared/one /shared/hard; mkfifo /shared/fifo; mv /shared/two /shared/moved",
    ]);
    c.edit(|spec| spec["process"]["noNewPrivileges"] = json!(false));
    assert_eq!(c.start(&[]).ok().text(), "1000:2000:644\n0:0:644");
    c.delete();
    let new = fs::metadata(dir.join("new")).expect("the container made it");
    assert_eq!((new.uid(), new.gid(), new.mode() & 0o7777), (1234, 5678, 0o4750));
    assert_eq!(fs::metadata(dir.join("hard")).expect("the container made it").nlink(), 2);
    assert_eq!(fs::read_link(dir.join("link")).expect("the container made it").as_os_str(), "one");
    assert!(dir.join("fifo").exists() && dir.join("moved").exists() && !dir.join("two").exists());
}

fn tmpfs_mount(node: &Node) {
    let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m:mode=1777";
    let script = "stat -c %a /scratch; dd if=/dev/zero of=/scratch/file bs=1M count=2 2>&1; stat -c %s /scratch/file";
    let run = node.run(&["--rm", "--mount", mount], BUSYBOX, &["sh", "-c", script]).ok();
    assert!(run.text().starts_with("1777\n") && run.text().ends_with("\n1048576"), "{run}");
    assert!(run.text().contains("No space left"), "{run}");
}

/// Every layer's own file is there, and of the file that all of them have, the topmost.
fn layers(node: &Node, count: usize) {
    let image = node.image(&format!("layers-{count}"));
    let run = node.run(&["--rm"], &image, &["sh", "-c", "cat /layer-top; cat /layers/*"]).within(patience() * 3).ok();
    let text = run.text();
    let expected: Vec<_> = std::iter::once(count).chain(2..=count).map(|n| n.to_string()).collect();
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

fn thirty_layers(node: &Node) {
    layers(node, 30);
}

fn a_hundred_layers(node: &Node) {
    layers(node, 100);
}

fn a_distribution(node: &Node) {
    // Its command looks at every kind of file, at whiteouts and at opaque directories.
    let image = node.image("debian-python");
    let text = node.run(&["--rm"], &image, &[]).within(patience() * 3).ok().text();
    assert!(text.contains("hello from the app layer: python 3"), "{text}");
    assert!(text.lines().filter(|line| line.starts_with("ok ")).count() >= 12, "{text}");
}

fn file_system_semantics(node: &Node) {
    // Things programs rely on, over a lower that is read-only: copy-up, rename, links, xattrs, sparse files, and
    // a directory that was deleted and made again.
    let script = "set -e; cd /etc; cp -a passwd copy; mv copy moved; ln moved hard; ln -s moved soft; \
                  chmod 600 group; stat -c %a group; truncate -s 1G sparse; du -k sparse | cut -f1; \
                  rm -r /home; mkdir /home; ls /home | wc -l; \
                  mv /var /var2; test -d /var2 && echo renamed; stat -c %h moved";
    let run = node.run(&["--rm"], BUSYBOX, &["sh", "-c", script]).ok();
    assert_eq!(run.text(), "600\n0\n0\nrenamed\n2");
}

fn a_full_upper_harms_nobody_else(node: &Node) {
    if !node.is_nacelle() {
        return; // a container of runc's writes to the node's own disk
    }
    let other = node.resident();
    let configured = node.configure("rootfs.upper_mib = 64");
    let pod = node.pod(&[BUSYBOX, BUSYBOX]);
    let [_, full, neighbour] = &pod[..] else { panic!("a sandbox and two containers") };
    neighbour.sh("echo written >/before");
    // What was set aside for the first, and not needed in the end, is free again once it is on the disk.
    let script = "dd if=/dev/zero of=/filler bs=1M; sync; dd if=/dev/zero of=/filler2 bs=4k";
    let filled = full.exec(&[], &["sh", "-c", script]).within(patience() * 2).run();
    filled.expect_failure(&["No space left"]);
    assert_eq!(full.sh("df -m / | awk 'END {print ($2 <= 64)}'; echo x 2>/dev/null >/more || echo full"), "1\nfull");
    // The disk is the pod's: who shares it runs on, keeps what it has, and may write again when there is room. A limit for each
    // container needs quotas, see `kernel::quota_spares_the_neighbour`.
    assert_eq!(
        neighbour.sh("cat /before; grep -c ^root /etc/passwd; echo x >/dev/shm/x && cat /dev/shm/x"),
        "written\n1\nx"
    );
    // Nobody else has it.
    assert_eq!(other.sh("echo fine >/file && cat /file"), "fine");
    full.sh("rm /filler /filler2; sync");
    assert_eq!(neighbour.sh("echo fits >/file && cat /file"), "fits");
    pod.into_iter().rev().for_each(Container::remove);
    drop(configured);
}

fn patches_by_configuration_and_annotation(node: &Node) {
    if !node.is_nacelle() {
        return;
    }
    let (list, source) = (node.path("patches.json"), node.path("patch-source"));
    fs::write(&source, "copied\n").expect("write a file");
    let patches = json!([
        { "kind": "text", "path": "/etc/motd", "content": "node\n" },
        { "kind": "copy-file", "src": source, "dst": "/copy" },
        { "kind": "remove", "path": "/home" },
    ]);
    fs::write(&list, patches.to_string()).expect("write the list");
    let configured = node.configure(&format!("rootfs.patches = {list:?}"));
    let annotation = |patches: serde_json::Value| format!("io.nacelle.patches={patches}");
    let good = annotation(json!([{ "kind": "append", "path": "/etc/motd", "content": "pod\n" }]));
    let script = "cat /etc/motd /copy; test ! -e /home && echo removed; echo more >>/etc/motd && tail -n 1 /etc/motd";
    let run = node.run(&["--rm", "--annotation", &good], BUSYBOX, &["sh", "-c", script]).ok();
    assert_eq!(run.text(), "node\npod\ncopied\nremoved\nmore", "{run}");
    // A pod's author may not copy what the node's owner may.
    let bad = annotation(json!([{ "kind": "copy-file", "src": source, "dst": "/stolen" }]));
    let run = node.run(&["--rm", "--annotation", &bad], BUSYBOX, &["true"]).run();
    run.expect_failure(&["apply patch 0 to /stolen", "patch-source"]);
    drop(configured);
    assert_eq!(node.run(&["--rm"], BUSYBOX, &["sh", "-c", "test -d /home && echo there"]).ok().text(), "there");
}

fn packages_are_installed(node: &Node) {
    // Package managers do what file systems are asked for seldom: rename over what is there, link, sync, lock.
    let image = node.image("debian-python");
    let script = "set -e; mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates; : >/var/lib/dpkg/status; \
                  dpkg --force-depends --force-not-root --force-bad-path -i /app/packages/hello.deb >&2; hello; \
                  dpkg -s hello | grep ^Status; \
                  mkdir -p /etc/ssl/certs; echo \"$AUTHORITY\" >/etc/ssl/certs/ca-certificates.crt; \
                  pip=$(echo /usr/share/python-wheels/pip-*.whl)/pip; python3 $pip install --quiet --no-index --break-system-packages \
                  --root-user-action=ignore /app/packages/greeting-1.0-py3-none-any.whl; \
                  python3 -c 'import greeting; print(greeting.WORDS)'";
    // pip reads it at its start, though it asks nobody.
    let authority = concat!("AUTHORITY=", include_str!("authority.pem"));
    let run = node.run(&["--rm", "--env", authority], &image, &["sh", "-c", script]).within(patience() * 6).ok();
    assert_eq!(run.text(), "Hello, world!\nStatus: install ok installed\nhello from a wheel", "{run}");
}

/// The mounts of containerd's erofs snapshotter, from 2.2 on, reach the shim as they are.
fn images_that_the_snapshotter_made(node: &Node) {
    if !node.is_nacelle() {
        return; // runc leaves such mounts to containerd
    }
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let [mount] = &c.mounts()[..] else { panic!("one mount") };
    let option = |name: &str| {
        let value = mount.options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("{name} in {mount:?}")).to_owned()
    };
    let top = node.path("erofs-top");
    fs::create_dir_all(&top).expect("make a directory");
    fs::write(top.join("over"), "from the upper image\n").expect("write a file");
    let nacelle = node.shim_program().with_file_name("nacelle");
    let image = |name: &str, source: &str| {
        let image = node.path(name).display().to_string();
        Cmd::new(&nacelle).args(["layer", "build", source, "-o", &image]).ok();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o644)).expect("let others read the image");
        Mount { kind: "erofs".into(), source: image, options: vec!["ro".into(), "loop".into()] }
    };
    let options = [
        format!("workdir={}", option("workdir")),
        format!("upperdir={}", option("upperdir")),
        "lowerdir={{ overlay 0 1 }}".to_owned(),
    ];
    let root = Mount { kind: "format/mkdir/overlay".into(), source: "overlay".into(), options: options.into() };
    let top = image("top.erofs", top.to_str().expect("text"));
    c.create_task(&[top, image("base.erofs", &option("lowerdir")), root]).expect("create a task of images");
    let start = Message::default().bytes(1, c.id());
    node.call("/containerd.services.tasks.v1.Tasks/Start", start, patience()).expect("start the task");
    assert_eq!(
        c.sh("cat /over; echo new >/over && cat /over; grep -c ^root /etc/passwd"),
        "from the upper image\nnew\n1"
    );
    c.remove();
}
