//! The layer cache under real pods: together, damaged, collected. Each test has a cache of its own.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nacelle_tests::{
    command::{Cmd, patience, within},
    node::{BUSYBOX, Configured, Container, Node},
};
use serde_json::Value;

use crate::Case;

const NOT_OTHERS: &str = "it is about nacelle's layer cache";

pub const CASES: &[Case] = &[
    Case::only_nacelle("two_pods_convert_each_layer_once", two_pods_convert_each_layer_once, NOT_OTHERS),
    Case::only_nacelle("a_flipped_byte_is_repaired", a_flipped_byte_is_repaired, NOT_OTHERS),
    Case::only_nacelle("the_file_system_protects_images", the_file_system_protects_images, NOT_OTHERS),
    Case::only_nacelle("collection_under_load", collection_under_load, NOT_OTHERS),
    Case::only_nacelle("the_cache_keeps_its_limit", the_cache_keeps_its_limit, NOT_OTHERS),
    Case::only_nacelle("an_unseen_layer_is_used_at_once", an_unseen_layer_is_used_at_once, NOT_OTHERS),
];

/// An empty cache, used by the pods that start while it lives.
struct Cache<'n> {
    dir: PathBuf,
    _configured: Configured<'n>,
}

impl<'n> Cache<'n> {
    fn new(node: &'n Node, name: &str, lines: &str) -> Self {
        let dir = node.path(name);
        fs::create_dir_all(&dir).expect("make a directory");
        Self { _configured: node.configure_data_dir(&dir, lines), dir }
    }

    /// `nacelle layer ARGS` on it.
    fn layer(&self, args: &[&str]) -> Cmd {
        layer(&self.dir, args)
    }

    /// Its images, as `nacelle layer ls` lists them.
    fn images(&self) -> Vec<Value> {
        serde_json::from_slice(&self.layer(&["ls", "--json"]).ok().out).expect("nacelle layer ls prints JSON")
    }
}

/// `nacelle layer ARGS` on the cache in `dir`.
fn layer(dir: &Path, args: &[&str]) -> Cmd {
    Cmd::new("nacelle").args(["layer", "--data-dir"]).args([dir]).args(args)
}

impl Drop for Cache<'_> {
    fn drop(&mut self) {
        // Also after a test that failed, whose pods may still be there.
        fs::remove_dir_all(&self.dir).ok();
    }
}

/// What of layers' directories a VMM is shown, from its mount table: the options of each mount.
fn shown(vmm: u32) -> Vec<String> {
    let table = fs::read_to_string(format!("/proc/{vmm}/mountinfo")).expect("the VMM's mounts");
    let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.filter(|fields| fields[4].contains("/layers/data/")).map(|fields| fields[5].to_owned()).collect()
}

/// How each layer of a sandbox's containers was come by: key and outcome, bottom first.
fn outcomes(sandbox: &str) -> Vec<(String, String)> {
    let list: Vec<Value> =
        serde_json::from_slice(&Cmd::new("nacelle").args(["ps", "--json"]).ok().out).expect("nacelle ps prints JSON");
    let status = list.into_iter().find(|status| status["sandbox"] == sandbox);
    let status = status.unwrap_or_else(|| panic!("no sandbox {sandbox}"));
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let layers = status["layers"].as_array().expect("layers").iter();
    layers.map(|layer| (text(&layer["key"]), text(&layer["outcome"]))).collect()
}

fn two_pods_convert_each_layer_once(node: &Node) {
    let image = node.image("layers-30");
    let cache = Cache::new(node, "cache-together", "");
    let pods = [node.fresh_id(), node.fresh_id()];
    let starts = pods.each_ref().map(|id| node.run_as(id, &["--detach"], &image, &["sleep", "1000"]).spawn());
    starts.into_iter().for_each(|start| drop(start.wait(patience() * 3).expect(0)));
    let [one, other] = pods.each_ref().map(|id| outcomes(id));
    assert_eq!((one.len(), other.len()), (30, 30));
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(one.0, other.0, "both have the same layers");
        let mut ways = [one.1.as_str(), other.1.as_str()];
        ways.sort_unstable();
        assert_eq!(ways, ["built", "reused"], "layer {}", one.0);
    }
    for id in &pods {
        let c = node.adopt(id);
        assert_eq!(c.sh("cat /layer-top; ls /layers | wc -l"), "30\n29");
        c.remove();
    }
    drop(cache);
}

/// Changes one byte in the middle of a file; `silent`: as a disk does it, with the file's time as it was.
fn flip_a_byte(path: &Path, silent: bool) {
    let file = fs::File::options().read(true).write(true).open(path).expect("open the image");
    let metadata = file.metadata().expect("look at the image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, metadata.len() / 2).expect("read the image");
    file.write_all_at(&[!byte[0]], metadata.len() / 2).expect("write the image");
    if silent {
        file.set_modified(metadata.modified().expect("a time")).expect("set the time");
    }
}

fn a_flipped_byte_is_repaired(node: &Node) {
    let cache = Cache::new(node, "cache-flipped", "");
    let probe = ["sh", "-c", "md5sum /bin/busybox; sleep 1000"];
    let run = |expected: &str| {
        let c = node.detached(&[], BUSYBOX, &probe);
        let found = outcomes(c.id());
        let sum = c.sh("md5sum /bin/busybox");
        c.remove();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].1, expected);
        (cache.dir.join("layers/erofs-v1").join(format!("{}.erofs", found[0].0)), sum)
    };
    let (image, sum) = run("built");
    flip_a_byte(&image, false);
    assert_eq!(run("rebuilt").1, sum);
    flip_a_byte(&image, true);
    assert_eq!(cache.layer(&["verify"]).run().code, 1, "a silent change is found by reading");
    let repaired = cache.layer(&["verify", "--repair"]).ok().text();
    assert!(repaired.ends_with("checksum mismatch, removed"), "{repaired}");
    assert_eq!(run("built").1, sum);
    assert!(cache.layer(&["verify"]).ok().text().ends_with(" ok"));
}

/// A file system with fs-verity, in a file, mounted while this lives.
struct WithVerity {
    disk: PathBuf,
    dir: PathBuf,
}

impl WithVerity {
    fn new(node: &Node, name: &str) -> Self {
        let (disk, dir) = (node.path(&format!("{name}.ext4")), node.path(name));
        let options = ["-q", "-O", "verity", "-b", "4096"];
        Cmd::new("mkfs.ext4").args(options).args([&disk]).args(["128M"]).ok();
        fs::create_dir_all(&dir).expect("make a directory");
        Cmd::new("mount").args(["-o", "loop"]).args([&disk, &dir]).ok();
        Self { disk, dir }
    }

    /// Damages the block in the middle of a file, as the medium would.
    fn damage(&self, path: &Path) {
        Cmd::new("sync").ok();
        let middle = fs::metadata(path).expect("look at the file").len() / 4096 / 2;
        let inside = path.strip_prefix(&self.dir).expect("a file of this file system");
        let question = format!("bmap /{} {middle}", inside.display());
        let block: u64 =
            Cmd::new("debugfs").args(["-R", &question]).args([&self.disk]).ok().text().parse().expect("a block");
        let disk = fs::File::options().write(true).open(&self.disk).expect("open the disk");
        disk.write_all_at(b"damaged", block * 4096).expect("write to the disk");
        fs::write("/proc/sys/vm/drop_caches", "3").expect("forget what was read");
    }
}

impl Drop for WithVerity {
    fn drop(&mut self) {
        Cmd::new("umount").args(["--lazy"]).args([&self.dir]).run();
        fs::remove_dir(&self.dir).ok();
        fs::remove_file(&self.disk).ok();
    }
}

fn the_file_system_protects_images(node: &Node) {
    let disk = WithVerity::new(node, "cache-verity");
    let cache = Cache::new(node, "cache-verity", "");
    let run = |expected: &str| {
        let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
        let found = outcomes(c.id());
        assert_eq!((found.len(), found[0].1.as_str()), (1, expected));
        let image = cache.dir.join("layers/erofs-v1").join(format!("{}.erofs", found[0].0));
        within(patience(), "nobody can write to the image, not even root", || {
            fs::File::options().write(true).open(&image).is_err().then_some(())
        });
        let sum = c.sh("md5sum /bin/busybox");
        c.remove();
        (image, sum)
    };
    let (image, sum) = run("built");
    assert_eq!(run("reused").1, sum);
    disk.damage(&image);
    let error = fs::read(&image).expect_err("wrong bytes are not read");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
    assert_eq!(cache.layer(&["verify"]).run().code, 1, "it is found by reading");
    let repaired = cache.layer(&["verify", "--repair"]).ok().text();
    assert!(repaired.contains("Input/output error") && repaired.ends_with("removed"), "{repaired}");
    assert_eq!(run("built").1, sum);
    assert!(cache.layer(&["verify"]).ok().text().ends_with(" ok"));
}

fn collection_under_load(node: &Node) {
    let image = node.image("layers-30");
    let cache = Cache::new(node, "cache-load", "");
    let (done, dir) = (AtomicBool::new(false), cache.dir.clone());
    let collections = std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut removed = 0;
            while !done.load(Ordering::Relaxed) {
                removed += layer(&dir, &["gc", "--max", "0"]).ok().text().matches("removed ").count();
                // An emulated processor has other things to do as well.
                std::thread::sleep(Duration::from_millis(500));
            }
            removed
        });
        for _ in 0..2 {
            let pods = [node.fresh_id(), node.fresh_id()];
            let script = "cat /layer-top; cat /layers/*; md5sum </bin/busybox | wc -l";
            let runs = pods.each_ref().map(|id| node.run_as(id, &["--rm"], &image, &["sh", "-c", script]).spawn());
            for run in runs {
                let text = run.wait(patience() * 4).expect(0).text();
                let expected: Vec<_> = std::iter::once(30).chain(2..=30).chain([1]).map(|n| n.to_string()).collect();
                assert_eq!(text.lines().collect::<Vec<_>>(), expected);
            }
        }
        done.store(true, Ordering::Relaxed);
        collector.join().expect("the collector does not fail")
    });
    assert!(collections > 0, "nothing was ever collected");
    cache.layer(&["verify"]).ok();
}

fn the_cache_keeps_its_limit(node: &Node) {
    let many = node.image("layers-30");
    let cache = Cache::new(node, "cache-limit", "rootfs.cache_mib = 1\n");
    node.run(&["--rm"], &many, &["true"]).within(patience() * 3).ok();
    // The small ones are in the merged image, so nobody needs their own any more.
    within(patience(), "the large layer and what all 30 were merged into stay: in use when the limit was kept", || {
        (cache.images().len() == 2).then_some(())
    });
    // Another image's conversion makes room.
    let other = node.image("debian-tools");
    let c = node.detached(&[], &other, &["sleep", "1000"]);
    let images = within(patience(), "the unused layers go", || {
        Some(cache.images()).filter(|images| images.iter().all(|image| image["in_use"] == true))
    });
    let size = images.iter().filter_map(|image| image["size"].as_u64()).sum::<u64>();
    assert!(size > 1 << 20, "what is in use stays, though it is more than the limit: {size}");
    let large = outcomes(c.id()).into_iter().find(|(key, _)| images.iter().any(|image| image["key"] == *key));
    assert!(large.is_some(), "the large layer is in use: {images:?}");
    assert_eq!(c.sh("ls / | grep -c ^etc"), "1");
    c.remove();
    // And the layers that went are converted again.
    assert_eq!(node.run(&["--rm"], &many, &["cat", "/layer-top"]).within(patience() * 3).ok().text(), "30");
}

/// The first pod reads large files in the snapshot's directory; the next has the image that was made meanwhile.
fn an_unseen_layer_is_used_at_once(node: &Node) {
    let image = node.image("debian-python");
    let cache = Cache::new(node, "cache-index", "rootfs.index_mib = 1\n");
    let ways = |sandbox: &str| outcomes(sandbox).into_iter().map(|(_, way)| way).collect::<Vec<_>>();
    let sum = "cksum $(readlink -f $(command -v python3))";
    let look = "python3 /app/hello.py | grep -c ^ok; stat -c %h $(readlink -f $(command -v python3))";
    // Alone, in a VM that has no volumes.
    let c = node.detached(&[], &image, &["sleep", "1000"]);
    let first = ways(c.id());
    assert!(first.iter().any(|way| way == "indexed") && first.iter().all(|way| way != "reused"), "{first:?}");
    let lent = shown(c.pid());
    assert!(!lent.is_empty(), "what is indexed is shown");
    assert!(
        lent.iter().all(|options| ["ro", "nosuid", "nodev"].iter().all(|o| options.split(',').any(|has| has == *o)))
    );
    let whole = c.sh(sum);
    assert_eq!(c.sh(look), "12\n1");
    // A copy that the container makes of such a file is whole, whatever makes it copy.
    let python = "p=$(readlink -f $(command -v python3));";
    assert_eq!(c.sh(&format!("{python} chmod 700 $p; echo >>$p; stat -c %a $p; python3 -c 'print(6 * 7)'")), "700\n42");
    let images = within(patience() * 2, "the whole images are made", || {
        Some(cache.images()).filter(|images| images.iter().filter(|image| image["source"] != "4 layers").count() == 4)
    });
    assert!(images.len() <= 5, "{images:?}");
    c.remove();
    let c = node.detached(&[], &image, &["sleep", "1000"]);
    assert!(ways(c.id()).iter().all(|way| way == "reused"));
    assert!(shown(c.pid()).is_empty());
    assert_eq!((c.sh(sum), c.sh(look)), (whole.clone(), "12\n1".to_owned()));
    c.remove();
    // Later, in a pod that runs.
    cache.layer(&["gc", "--max", "0"]).ok();
    let pod = node.pod(&[&image, &image]);
    assert!(ways(pod[0].id()).iter().any(|way| way == "indexed"));
    for c in &pod[1..] {
        assert_eq!(c.sh(sum), whole);
    }
    let vmm = pod[0].pid();
    assert!(!shown(vmm).is_empty());
    let mut pod = pod.into_iter();
    let sandbox = pod.next();
    pod.for_each(Container::remove);
    assert_eq!(shown(vmm), [""; 0], "what is no more needed is taken back");
    sandbox.into_iter().for_each(Container::remove);
}
