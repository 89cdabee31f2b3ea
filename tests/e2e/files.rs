//! A container's files as the host sees them: in its snapshot, when it is paused and when it has ended, and in its next task.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nacelle_tests::{
    command::{Cmd, patience, within},
    node::{BUSYBOX, Container, Node},
};
use rustix::fs::XattrFlags;
use rustix::process::{Pid, Signal, kill_process};

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("outlive_their_task", outlive_their_task),
    Case::new("of_a_task_that_was_killed", of_a_task_that_was_killed),
    Case::new("are_in_the_snapshot_while_paused", are_in_the_snapshot_while_paused),
    Case::new("of_every_kind_come_back", of_every_kind_come_back),
    Case::new("put_into_the_snapshot_before_the_start", put_into_the_snapshot_before_the_start),
    Case::new("of_a_container_that_runs", of_a_container_that_runs),
    Case::new("of_a_container_that_runs_by_the_dozen", of_a_container_that_runs_by_the_dozen),
    Case::only_nacelle(
        "that_do_not_fit_the_host",
        that_do_not_fit_the_host,
        "with others they are written there at once",
    ),
    Case::only_nacelle(
        "hidden_where_the_configuration_says_so",
        hidden_where_the_configuration_says_so,
        "it is nacelle's own",
    ),
    Case::only_nacelle("of_a_machine_that_dies_in_between", of_a_machine_that_dies_in_between, "it has no VMM"),
    Case::only_nacelle(
        "stay_where_the_configuration_says_so",
        stay_where_the_configuration_says_so,
        "it is nacelle's own",
    ),
];

/// The directory of a container's snapshot where its own files are.
fn upper(container: &Container) -> PathBuf {
    let mounts = container.mounts();
    let options = mounts.iter().flat_map(|mount| &mount.options);
    options.filter_map(|option| option.strip_prefix("upperdir=")).next().expect("an upper directory").into()
}

/// Runs the container's next task to its end; what it prints.
fn next(container: &Container) -> String {
    container.start(&[]).ok().text()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

fn whiteout(path: &Path) -> bool {
    let metadata = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("look at {}: {e}", path.display()));
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// Nothing but the snapshotter's own is beside the upper directory.
fn nothing_beside(upper: &Path) {
    let beside = fs::read_dir(upper.parent().expect("a parent")).expect("list the snapshot");
    let mut names: Vec<_> = beside.map(|entry| entry.expect("an entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["fs", "work"]);
}

fn pause(node: &Node, container: &Container) {
    node.ctr(["tasks", "pause", container.id()]).ok();
}

fn resume(node: &Node, container: &Container) {
    node.ctr(["tasks", "resume", container.id()]).ok();
}

/// Kills the task and deletes it, and not the container.
fn end(node: &Node, container: &Container) {
    container.try_kill().expect("kill");
    container.wait(patience()).expect("wait");
    // Its exit code is the task's.
    node.ctr(["tasks", "delete", container.id()]).run();
    assert_eq!(container.state(), None);
}

fn outlive_their_task(node: &Node) {
    let script = "echo run >>/runs; wc -l </runs; if test -e /home; then rm -r /home; else echo no home; fi; \
                  if test -e /new; then rm -r /new /etc/passwd; mkdir /etc/passwd; else mkdir -p /new/dir; fi; \
                  test -d /etc/passwd && echo a directory; ls /etc/passwd";
    let c = node.created(&[], BUSYBOX, &["sh", "-c", script]);
    assert_eq!(next(&c), "1\n/etc/passwd");
    assert!(upper(&c).join("new/dir").is_dir(), "there when the exit is known");
    assert_eq!(next(&c), "2\nno home\na directory");
    assert!(whiteout(&upper(&c).join("home")), "the image has it");
    assert!(fs::symlink_metadata(upper(&c).join("new")).is_err(), "the image never had it");
    assert_eq!(next(&c), "3\nno home\na directory");
    nothing_beside(&upper(&c));
    c.delete();
}

fn of_a_task_that_was_killed(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sh", "-c", "cat /kept; echo ready; sleep 1000"]);
    c.sh("echo kept >/kept");
    end(node, &c);
    assert_eq!(read(upper(&c).join("kept")), "kept\n");
    let task = c.start(&[]).spawn();
    task.sees("kept\nready", patience());
    c.sh("rm /kept");
    end(node, &c);
    // It takes its streams away by itself.
    drop(task.wait(patience() * 3));
    assert!(!upper(&c).join("kept").exists(), "it was never in the image, so nothing tells of it");
    c.delete();
}

fn are_in_the_snapshot_while_paused(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sh", "-c", "while :; do echo line >>/log; sleep 0.05; done"]);
    c.sh("mkdir /dir; echo one >/dir/one; rm /etc/passwd");
    pause(node, &c);
    let upper = upper(&c);
    assert_eq!(read(upper.join("dir/one")), "one\n");
    if node.is_nacelle() {
        let lines = read(upper.join("log"));
        assert!(lines.starts_with("line\n"), "{lines}");
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert_eq!(lines, read(upper.join("log")), "it stands still");
    }
    assert!(whiteout(&upper.join("etc/passwd")));
    resume(node, &c);
    c.sh("rm -r /dir; echo mine >/etc/passwd");
    pause(node, &c);
    assert!(!upper.join("dir").exists());
    assert_eq!(read(upper.join("etc/passwd")), "mine\n");
    resume(node, &c);
    assert_eq!(c.sh("cat /etc/passwd"), "mine");
    end(node, &c);
    nothing_beside(&upper);
    c.delete();
}

fn of_every_kind_come_back(node: &Node) {
    let make = "set -e; mkdir /all; cd /all; echo text >file; ln file second; ln -s ../etc/passwd link; mkfifo fifo; \
                mknod null c 1 3; chmod 4755 file; chown 12:34 fifo; touch -h -d '2001-02-03 04:05:06' link; \
                dd if=/dev/zero of=hole bs=1 count=1 seek=100M 2>/dev/null; mkdir -p a/b/c; chmod 1777 a/b; \
                touch -d '2002-03-04 05:06:07' a/b a; rm -r /home; mkdir /home; \
                n=$(printf 'n%.0s' $(seq 200)); mkdir -p $n/$n; echo deep >$n/$n/$n; cp /bin/sh copy";
    let look = "cd /all; stat -c '%n %F %a %u:%g %h %s %t:%T' file second fifo null hole; stat -c '%n %F %a' a a/b; \
                readlink link; stat -c %y link a a/b; ls -A /home; n=$(printf 'n%.0s' $(seq 200)); cat $n/$n/$n; \
                cmp copy /bin/sh && echo same";
    let script = format!("test -e /all || {{ {make}; }}; {look}");
    let c = node.created(&["--env", "TZ=UTC"], BUSYBOX, &["sh", "-c", &script]);
    let first = next(&c);
    assert!(first.contains("file regular file 4755 0:0 2 5"), "{first}");
    assert!(first.contains("2001-02-03 04:05:06") && first.ends_with("deep\nsame"), "{first}");
    let hole = upper(&c).join("all/hole");
    assert!(fs::metadata(&hole).expect("a file").blocks() < 2048, "holes stay holes");
    assert_eq!(next(&c), first);
    assert_eq!(next(&c), first);
    c.delete();
}

fn put_into_the_snapshot_before_the_start(node: &Node) {
    let script = "cat /put; rm /put; echo back >/back";
    let c = node.created(&[], BUSYBOX, &["sh", "-c", script]);
    fs::write(upper(&c).join("put"), "put there\n").expect("write");
    assert_eq!(next(&c), "put there");
    assert_eq!(read(upper(&c).join("back")), "back\n");
    assert!(!upper(&c).join("put").exists());
    c.delete();
}

fn that_do_not_fit_the_host(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    let upper = upper(&c);
    let small = upper.parent().expect("a parent").to_owned();
    Cmd::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).args([&small]).ok();
    fs::create_dir(&upper).and_then(|()| fs::create_dir(small.join("work"))).expect("make directories");
    fs::write(upper.join("before"), "before\n").expect("write");
    c.start(&["--detach"]).ok();
    c.sh("dd if=/dev/urandom of=/large bs=64k count=64 2>/dev/null; echo after >/before");
    node.ctr(["tasks", "pause", c.id()]).run().expect_failure(&["No space left on device"]);
    assert_eq!((c.state().as_deref(), read(upper.join("before"))), (Some("RUNNING"), "before\n".to_owned()));
    assert_eq!(c.sh("cat /before; rm /large"), "after", "it goes on");
    pause(node, &c);
    assert_eq!(read(upper.join("before")), "after\n");
    resume(node, &c);
    c.sh("dd if=/dev/urandom of=/large bs=64k count=64 2>/dev/null; echo lost >/before");
    let log = node.log_length();
    end(node, &c);
    assert!(node.logged_since(log, "what it has written is lost"), "{}", node.log_since(log));
    assert_eq!(read(upper.join("before")), "after\n");
    nothing_beside(&upper);
    Cmd::new("umount").args([&small]).ok();
    c.delete();
}

fn of_a_machine_that_dies_in_between(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    c.sh("dd if=/dev/urandom of=/large bs=1M count=48 2>/dev/null");
    let upper = upper(&c);
    let pausing = node.ctr(["tasks", "pause", c.id()]).spawn();
    let half = upper.parent().expect("a parent").join(".nacelle-fs-next/large");
    within(patience(), "the export has begun", || fs::metadata(&half).is_ok_and(|m| m.len() > 0).then_some(()));
    let pid = Pid::from_raw(c.pid().cast_signed()).expect("a process id");
    kill_process(pid, Signal::KILL).expect("kill the VMM");
    assert_ne!(pausing.wait(patience()).code, 0, "a pause without its export");
    c.wait(patience()).expect("wait");
    assert_eq!(fs::read_dir(&upper).expect("list").count(), 0, "as it was before");
    node.ctr(["tasks", "delete", c.id()]).run();
    nothing_beside(&upper);
    c.delete();
}

fn stay_where_the_configuration_says_so(node: &Node) {
    let configured = node.configure("rootfs.export = false");
    let c = node.created(&[], BUSYBOX, &["sh", "-c", "echo run >>/runs; wc -l </runs"]);
    assert_eq!(next(&c), "1");
    assert_eq!(fs::read_dir(upper(&c)).expect("list").count(), 0);
    assert_eq!(next(&c), "1");
    drop(configured);
    c.delete();
}

/// The root of the process that containerd knows.
fn root(container: &Container) -> PathBuf {
    format!("/proc/{}/root", container.pid()).into()
}

fn directory(node: &Node, name: &str) -> PathBuf {
    let dir = node.path(name);
    fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("make {}: {e}", dir.display()));
    dir
}

fn of_a_container_that_runs(node: &Node) {
    let volume = directory(node, "files-volume");
    fs::write(volume.join("inside"), "volume").expect("write");
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:ro", volume.display());
    let tmpfs = "type=tmpfs,src=tmpfs,dst=/scratch,options=mode=1777";
    let c = node.detached(&["--mount", &mount, "--mount", tmpfs], BUSYBOX, &["sleep", "1000000"]);
    let root = root(&c);
    let script = "echo written >/written; echo scratch >/scratch/file; ln -s written /link; mkfifo /fifo; \
                  head -c 3000000 /dev/urandom >/large; chown 12:34 /written; chmod 4751 /written; rm -r /var";
    c.sh(script);

    // What its processes see: their layers, what they have written and removed, what is mounted.
    assert_eq!(read(root.join("etc/passwd")), c.sh("cat /etc/passwd") + "\n");
    assert_eq!(read(root.join("written")), "written\n");
    assert_eq!(read(root.join("scratch/file")), "scratch\n");
    assert_eq!(read(root.join("volume/inside")), "volume");
    assert_eq!(fs::read_link(root.join("link")).expect("a link"), Path::new("written"));
    assert!(fs::symlink_metadata(root.join("fifo")).expect("a pipe").file_type().is_fifo());
    assert!(fs::symlink_metadata(root.join("var")).is_err(), "it has been removed");
    let written = fs::metadata(root.join("written")).expect("a file");
    assert_eq!((written.uid(), written.gid(), written.mode() & 0o7777), (12, 34, 0o4751));
    let large = Cmd::new("sha256sum").args(["large"]).cwd(&root).ok().text();
    assert_eq!(large, c.sh("cd / && sha256sum large"));
    let names = |dir: &Path| {
        let list = fs::read_dir(dir).expect("list");
        let mut names: Vec<_> =
            list.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names.join("\n")
    };
    assert_eq!(names(&root), c.sh("ls -1A / | sort"));

    // What is changed from outside is what its processes see, at once.
    let made = root.join("made");
    fs::create_dir(&made).expect("make a directory");
    fs::write(made.join("file"), "x".repeat(300_000)).expect("write");
    chown(made.join("file"), Some(1000), Some(2000)).expect("chown");
    fs::set_permissions(made.join("file"), Permissions::from_mode(0o2640)).expect("chmod");
    fs::hard_link(made.join("file"), made.join("second")).expect("link");
    symlink("file", made.join("symlink")).expect("symlink");
    fs::rename(root.join("written"), made.join("moved")).expect("rename");
    fs::remove_file(root.join("fifo")).expect("remove");
    Cmd::new("touch").args(["-d", "2001-02-03 04:05:06.789 UTC"]).args([made.join("moved")]).ok();
    rustix::fs::setxattr(made.join("file"), "user.name", b"value", XattrFlags::empty()).expect("set attribute");
    assert_eq!(
        c.sh("stat -c '%u %g %a %h %s' /made/file; readlink /made/symlink; cat /made/moved; ls /fifo 2>&1 | wc -l"),
        "1000 2000 2640 2 300000\nfile\nwritten\n1"
    );
    assert_eq!(c.sh("stat -c %Y /made/moved"), "981173106");
    let mut value = [0; 5];
    rustix::fs::getxattr(made.join("file"), "user.name", &mut value).expect("get attribute");
    assert_eq!(&value, b"value");
    c.sh("echo more >>/made/moved");
    assert_eq!(read(made.join("moved")), "written\nmore\n", "nothing is remembered");
    // A read-only volume is so from here, too.
    let refused = fs::write(root.join("volume/new"), "x").expect_err("read-only");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    // Nobody else of the host's gets there.
    let other = Cmd::new("setpriv").args(["--reuid", "4321", "--regid", "4321", "--clear-groups", "ls"]).args([&root]);
    other.run().expect_failure(&["Permission denied"]);

    // A container that is paused has files, too; one that has ended leaves nobody waiting.
    pause(node, &c);
    assert_eq!(read(made.join("moved")), "written\nmore\n");
    resume(node, &c);
    let held = fs::File::open(made.join("file")).expect("open");
    c.remove();
    if node.is_nacelle() {
        within(patience(), "a file of a container that is gone cannot be read", || held.read_at(&mut [0], 0).err());
    }
}

fn of_a_container_that_runs_by_the_dozen(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000000"]);
    let root = root(&c);
    let tree = directory(node, "files-tree");
    for n in 0..60 {
        let dir = tree.join(format!("{}", n % 10));
        fs::create_dir_all(&dir).expect("make a directory");
        fs::write(dir.join(format!("{n}")), format!("file {n}")).expect("write");
    }
    // As `nerdctl cp` does.
    let copy = |from: &Path, to: &Path| {
        let script = format!("tar -C {} -cf - . | tar -C {} -xf -", from.display(), to.display());
        Cmd::new("sh").args(["-ec", &script]).ok();
    };
    fs::create_dir(root.join("tree")).expect("make a directory");
    copy(&tree, &root.join("tree"));
    assert_eq!(c.sh("find /tree -type f | wc -l; cat /tree/7/57"), "60\nfile 57");
    let back = directory(node, "files-back");
    copy(&root.join("tree"), &back);
    Cmd::new("diff").args(["-r"]).args([&tree, &back]).ok();
    c.remove();
}

fn hidden_where_the_configuration_says_so(node: &Node) {
    let configured = node.configure("rootfs.proc_root = false");
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000000"]);
    drop(configured);
    assert!(fs::metadata(root(&c).join("etc/passwd")).is_err(), "the container's files are shown");
    c.remove();
}
