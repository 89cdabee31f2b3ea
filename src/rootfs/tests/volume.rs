//! Volumes: what lists and mounts say, and what is wrong with them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

use nacelle_rootfs::disk::Format;
use nacelle_rootfs::path::GuestPath;
use nacelle_rootfs::volume::{
    HostPerms, Kind, Policies, StatVirt, Surface, VOLUMES, Volume, VolumeError, check_name, decode, is_ours, of_mount,
    validate,
};

fn volume(guest: &str, kind: Kind) -> Volume {
    Volume { guest: GuestPath::parse(guest.as_bytes()).unwrap(), kind, readonly: false, noexec: false }
}

fn bind(host: &str) -> Kind {
    Kind::Bind { host: host.into(), policies: Policies::default() }
}

fn named(name: &str) -> Kind {
    Kind::Named { name: name.into(), policies: Policies::default() }
}

fn disk(host: &str, format: Format, fstype: Option<&str>) -> Kind {
    Kind::Disk { host: host.into(), format, fstype: fstype.map(Into::into) }
}

fn texts(errors: &[VolumeError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

/// What is said about a list with one entry.
fn refused(json: &str) -> Vec<String> {
    texts(&decode(format!("[{json}]").as_bytes()).expect_err(json))
}

fn read(json: &str) -> (Volume, Vec<String>) {
    let mut decoded = decode(format!("[{json}]").as_bytes()).unwrap_or_else(|e| panic!("{json}: {e:?}"));
    (decoded.volumes.remove(0), decoded.warnings)
}

/// What is said about one volume that was made by hand.
fn faults(volume: Volume) -> Vec<String> {
    validate(&[volume], Surface::Text).map_or_else(|errors| texts(&errors), |()| Vec::new())
}

fn mounted(kind: &str, source: &str, options: &str) -> Result<(Volume, Vec<String>), Vec<String>> {
    let options: Vec<String> = options.split_whitespace().map(Into::into).collect();
    of_mount(kind, source, "/data", &options).map_err(|errors| texts(&errors))
}

// B26
#[test]
fn options_are_nested_and_both_cases_are_read() {
    let off = Policies { stat_virt: Some(StatVirt::Off), host_perms: None };
    let with = |volume: Volume, readonly, noexec| Volume { readonly, noexec, ..volume };
    let table = [
        (
            with(volume("/a", bind("/srv/a")), true, false),
            r#"{"type":"Bind","host":"/srv/a","guest":"/a","options":{"readonly":true,"noexec":false}}"#,
            r#"{"type":"bind","host":"/srv/a","guest":"//a/.","options":{"readonly":true}}"#,
        ),
        (
            with(volume("/a", Kind::Named { name: "cache_1".into(), policies: off }), false, true),
            r#"{"type":"Named","name":"cache_1","guest":"/a","options":{"readonly":false,"noexec":true},"stat_virtualization":"off"}"#,
            r#"{"type":"named","name":"cache_1","guest":"/a/","options":{"noexec":true},"stat-virt":"off","host-perms":null}"#,
        ),
        (
            volume("/a", Kind::Tmpfs { size_mib: Some(64) }),
            r#"{"type":"Tmpfs","guest":"/a","size_mib":64,"options":{"readonly":false,"noexec":false}}"#,
            r#"{"type":"tmpfs","guest":"/a","size-mib":"64Mi"}"#,
        ),
        (
            volume("/a", Kind::Tmpfs { size_mib: None }),
            r#"{"type":"Tmpfs","guest":"/a","size_mib":null,"options":{"readonly":false,"noexec":false}}"#,
            r#"{"type":"Tmpfs","guest":"/a","options":{}}"#,
        ),
        (
            volume("/a", disk("/a.img", Format::Qcow2, Some("ext4"))),
            r#"{"type":"DiskImage","host":"/a.img","guest":"/a","format":"Qcow2","fstype":"ext4","options":{"readonly":false,"noexec":false}}"#,
            r#"{"type":"disk-image","host":"/a.img","guest":"/a","format":"qcow2","fstype":"ext4"}"#,
        ),
    ];
    for (volume, written, other) in table {
        assert_eq!(serde_json::to_string(&volume).unwrap(), written);
        assert_eq!(read(written), (volume.clone(), vec![]));
        assert_eq!(read(other), (volume.clone(), vec![]), "{other}");
        assert_eq!(volume.guest().to_string(), "/a", "B14");
    }
}

// B8, B27
#[test]
fn the_older_readonly_counts_without_options() {
    let kinds = [
        r#""type":"Bind","host":"/a""#,
        r#""type":"Named","name":"a""#,
        r#""type":"Tmpfs""#,
        r#""type":"DiskImage","host":"/a","format":"Raw""#,
    ];
    for kind in kinds {
        let flags = |rest: &str| {
            let (volume, warnings) = read(&format!(r#"{{{kind},"guest":"/a"{rest}}}"#));
            (volume.readonly, volume.noexec, warnings.len())
        };
        assert_eq!(flags(""), (false, false, 0));
        assert_eq!(flags(r#","readonly":true"#), (true, false, 0));
        assert_eq!(flags(r#","readonly":true,"options":null"#), (true, false, 0));
        assert_eq!(flags(r#","readonly":true,"options":{}"#), (false, false, 1), "options win");
        assert_eq!(flags(r#","readonly":false,"options":{"readonly":true,"noexec":true}"#), (true, true, 1));
        assert_eq!(flags(r#","options":{"noexec":true}"#), (false, true, 0), "what is missing is false");
    }
    assert_eq!(
        refused(r#"{"type":"DiskImage","host":"/a","guest":"/a"}"#),
        ["volume 0: format is missing, which a disk volume needs"]
    );
}

// B9, B27
#[test]
fn unknown_keys_are_told() {
    let (_, warnings) = read(
        r#"{"type":"Tmpfs","guest":"/a","quota_mib":null,"color":1,"options":{"nosuid":true,"nodev":false,"sync":true}}"#,
    );
    assert_eq!(
        warnings,
        [
            "volume 0: nodev holds for every volume and cannot be turned off",
            "volume 0: option \"sync\" is unknown and left out",
            "volume 0: key \"color\" is unknown and left out",
        ]
    );
}

// B21
#[test]
fn options_of_other_kinds_are_refused_by_name() {
    let table = [
        (
            r#""type":"DiskImage","host":"/a","format":"Raw","size_mib":1"#,
            "size_mib goes with tmpfs volumes alone, and this is a disk volume",
        ),
        (
            r#""type":"Bind","host":"/a","size-mib":1"#,
            "size_mib goes with tmpfs volumes alone, and this is a bind volume",
        ),
        (
            r#""type":"Bind","host":"/a","format":"Raw""#,
            "format goes with disk volumes alone, and this is a bind volume",
        ),
        (r#""type":"Tmpfs","fstype":"ext4""#, "fstype goes with disk volumes alone, and this is a tmpfs volume"),
        (r#""type":"Tmpfs","host":"/a""#, "host goes with bind and disk volumes alone, and this is a tmpfs volume"),
        (r#""type":"Bind","host":"/a","name":"a""#, "name goes with named volumes alone, and this is a bind volume"),
        // B18
        (
            r#""type":"Tmpfs","stat-virt":"off""#,
            "stat_virtualization goes with bind and named volumes alone, and this is a tmpfs volume",
        ),
        (
            r#""type":"DiskImage","host":"/a","format":"Raw","host_permissions":"mirror""#,
            "host_permissions goes with bind and named volumes alone, and this is a disk volume",
        ),
    ];
    for (fields, error) in table {
        assert_eq!(refused(&format!(r#"{{{fields},"guest":"/a"}}"#)), [format!("volume 0: {error}")]);
    }
}

// B15-B18
#[test]
fn of_the_policies_only_off_is_there() {
    let policies =
        |fields: &str| refused(&format!(r#"{{"type":"Bind","host":"/a","guest":"/a",{fields}}}"#)).join("; ");
    for (fields, error) in [
        (
            r#""stat_virtualization":"strict""#,
            "volume 0: stat-virt \"strict\" is not supported: the guest sees the files' real owners",
        ),
        (r#""stat-virt":"relaxed""#, "volume 0: stat-virt \"relaxed\" is not supported"),
        (
            r#""host_permissions":"private""#,
            "volume 0: host-perms \"private\" is not supported: what the guest changes",
        ),
        (r#""host-perms":"mirror""#, "volume 0: host-perms \"mirror\" is not supported"),
        (r#""stat-virt":"off","host-perms":"private""#, "volume 0: host-perms \"private\" is not supported"),
        (
            r#""stat-virt":"off","host-perms":"mirror""#,
            "volume 0: stat-virt \"off\" and host-perms \"mirror\" contradict each other",
        ),
        (r#""stat-virt":"OFF""#, "volume 0: stat-virt \"OFF\" is unknown: there are strict, relaxed and off"),
        (r#""host-perms":"none""#, "volume 0: host-perms \"none\" is unknown: there are private and mirror"),
        (r#""stat-virt":"off","stat_virtualization":"off""#, "volume 0: stat_virtualization is given twice"),
    ] {
        let said = policies(fields);
        assert!(said.starts_with(error), "{fields}: {said}");
        assert!(said.matches("volume 0").count() == 1, "{said}");
    }
    assert_eq!(policies(r#""stat-virt":"strict","host-perms":"mirror""#).matches("is not supported").count(), 2);
    // B25: lists that were never decoded.
    let pair = Policies { stat_virt: Some(StatVirt::Off), host_perms: Some(HostPerms::Mirror) };
    for kind in [Kind::Bind { host: "/a".into(), policies: pair }, Kind::Named { name: "a".into(), policies: pair }] {
        assert!(faults(volume("/a", kind))[0].contains("contradict each other"));
    }
}

// B19
#[test]
fn paths_in_the_guest_are_judged() {
    let guest = |path: &str| refused(&format!(r#"{{"type":"Tmpfs","guest":"{path}"}}"#)).join("; ");
    let table = [
        ("data", "volume 0: guest path \"data\": it must be absolute"),
        ("", "volume 0: guest path \"\": it must be absolute"),
        ("/", "volume 0: guest path \"/\": it names the root directory"),
        ("//.", "volume 0: guest path \"//.\": it names the root directory"),
        ("/a/../b", "volume 0: guest path \"/a/../b\": it has a \"..\", which could lead out of the root"),
        ("/data,ro", "volume 0: guest path \"/data,ro\" has one of \": ; ,\""),
        ("/a:b", "volume 0: guest path \"/a:b\" has one of \": ; ,\""),
        ("/a;b", "volume 0: guest path \"/a;b\" has one of \": ; ,\""),
        ("/proc", "volume 0: guest path \"/proc\" is at or below /proc, which belongs to the container's system"),
        ("//sys/./fs", "volume 0: guest path \"/sys/fs\" is at or below /sys, which belongs to the container's system"),
        ("/dev/shm", "volume 0: guest path \"/dev/shm\" is at or below /dev, which belongs to the container's system"),
    ];
    for (path, error) in table {
        assert_eq!(guest(path), error);
    }
    let fine = ["/process", "/sysroot", "/device", "/a b", "/\u{fc}"];
    for path in fine {
        assert_eq!(faults(volume(path, named("a"))), Vec::<String>::new());
    }
    assert_eq!(faults(volume("/data,ro", named("a"))), ["volume 0: guest path \"/data,ro\" has one of \": ; ,\""]);
    let twice = [volume("/a", named("a")), volume("/b", named("a")), volume("//a/.", bind("/a"))];
    let errors = texts(&validate(&twice, Surface::Mounts).unwrap_err());
    assert_eq!(errors, ["volume 2: guest path \"/a\" is that of volume 0 already"]);
}

// B20
#[test]
fn paths_of_the_host_are_judged() {
    let table = [
        (bind("/a,b"), "bind host path \"/a,b\" has one of \", : ;\""),
        (disk("/a:b.raw", Format::Raw, None), "disk image host path \"/a:b.raw\" has one of \", : ;\""),
        (bind("a"), "bind host path \"a\" is not absolute"),
        (bind("/a/../b"), "bind host path \"/a/../b\" has a \"..\""),
        (bind("/a\0"), "bind host path \"/a\\0\" has a NUL byte"),
        (bind(&"/a".repeat(3000)), "is too long"),
    ];
    for (kind, error) in table {
        let found = faults(volume("/a", kind));
        assert!(found.len() == 1 && found[0].ends_with(error), "{found:?}");
    }
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"/\xff").into();
    let kind = Kind::Bind { host: odd, policies: Policies::default() };
    assert_eq!(faults(volume("/a", kind)), ["volume 0: bind host path \"/\u{fffd}\" is not UTF-8"]);
    // Paths in fields of their own need no separators.
    assert!(validate(&[volume("/a:b", bind("/a:b,c;d"))], Surface::Mounts).is_ok());
}

// B22
#[test]
fn names_are_no_paths() {
    for name in ["cache_1", "a", "0", "A.b-c_d", &"n".repeat(128)] {
        assert_eq!(check_name(name), Ok(()));
    }
    let table = [
        ("", "volume name \"\" is empty"),
        ("..", "volume name \"..\" does not begin with a letter or digit"),
        (".lock", "volume name \".lock\" does not begin with a letter or digit"),
        ("-a", "volume name \"-a\" does not begin with a letter or digit"),
        ("\u{fc}", "volume name \"\u{fc}\" does not begin with a letter or digit"),
        ("a/b", "volume name \"a/b\" has something else than letters, digits, \".\", \"-\" and \"_\""),
        ("a/../b", "volume name \"a/../b\" has something else than letters, digits, \".\", \"-\" and \"_\""),
        ("a\0", "volume name \"a\\0\" has something else than letters, digits, \".\", \"-\" and \"_\""),
    ];
    for (name, error) in table {
        assert_eq!(check_name(name).unwrap_err().to_string(), error);
        assert_eq!(faults(volume("/a", named(name))), [format!("volume 0: {error}")]);
    }
    assert!(check_name(&"n".repeat(129)).unwrap_err().to_string().ends_with("is longer than 128 bytes"));
}

// B6, B25
#[test]
fn types_of_file_systems_are_judged() {
    let fault = |fstype| faults(volume("/a", disk("/a", Format::Raw, Some(fstype))));
    assert_eq!(fault(""), ["volume 0: file system type is empty"]);
    assert_eq!(fault("ext4,ro"), ["volume 0: file system type \"ext4,ro\" has one of \", ; : =\""]);
    assert_eq!(faults(volume("/a", Kind::Tmpfs { size_mib: Some(0) })), ["volume 0: size \"0\" is zero"]);
}

// B24
#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let json = br#"[
        {"type":"Disk"},
        {"type":"Tmpfs","guest":"/proc/a,b","size_mib":-1},
        {"type":"DiskImage","guest":"/a","format":"iso","fstype":1},
        {"type":"Named","name":"a","guest":"/a","options":[]},
        {"type":"Named","name":"a/b","guest":"/b"},
        {"type":"Bind","host":"/a:b","guest":"/b","options":{"readonly":1}},
        7,
        {}
    ]"#;
    assert_eq!(
        texts(&decode(json).unwrap_err()),
        [
            "volume 0: type \"Disk\" is unknown: there are Bind, Named, Tmpfs and DiskImage",
            "volume 1: size \"-1\" is not a whole number of MiB, such as 8192, 8192Mi or 8Gi",
            "volume 2: host is missing, which a disk volume needs",
            "volume 2: fstype is not a text",
            "volume 2: disk format \"iso\" is unknown: there are raw, qcow2 and vmdk",
            "volume 3: options is not an object",
            "volume 5: readonly is neither true nor false",
            "volume 6: it is not an object",
            "volume 7: type is missing",
            "volume 1: guest path \"/proc/a,b\" has one of \": ; ,\"",
            "volume 1: guest path \"/proc/a,b\" is at or below /proc, which belongs to the container's system",
            "volume 4: volume name \"a/b\" has something else than letters, digits, \".\", \"-\" and \"_\"",
            "volume 5: bind host path \"/a:b\" has one of \", : ;\"",
            "volume 5: guest path \"/b\" is that of volume 4 already",
        ]
    );
    for json in ["{}", "[", ""] {
        assert!(texts(&decode(json.as_bytes()).unwrap_err())[0].starts_with("list of volumes: "));
    }
    let many = format!("[{}]", vec!["1"; VOLUMES + 1].join(","));
    assert_eq!(texts(&decode(many.as_bytes()).unwrap_err()), ["list of volumes: more than 256 volumes"]);
    assert_eq!(decode(b"[]").unwrap().volumes, []);
}

// B8, B11, B13, B23
#[test]
fn mounts_are_volumes() {
    let is = |kind| Ok((volume("/data", kind), vec![]));
    assert_eq!(mounted("nacelle.named", "cache_1", "rbind rprivate nosuid nodev relatime rw"), is(named("cache_1")));
    let (volume, _) = mounted("nacelle.named", "cache_1", "ro noexec").unwrap();
    assert!(volume.readonly && volume.noexec);
    let (volume, _) = mounted("nacelle.named", "cache_1", "ro noexec rw exec").unwrap();
    assert!(!volume.readonly && !volume.noexec, "the later counts");
    for (source, options, format) in [
        ("/a.qcow2", "", Format::Qcow2),
        ("/a.img", "", Format::Raw),
        ("/a", "", Format::Raw),
        ("/a.qcow2", "ro format=raw", Format::Raw),
        ("/a.img", "format=vmdk rbind", Format::Vmdk),
    ] {
        let (volume, _) = mounted("nacelle.disk", source, options).unwrap();
        assert_eq!(volume.kind, disk(source, format, None));
    }
    let (volume, _) = mounted("nacelle.disk", "/a:b,c.raw", "fstype=squashfs").unwrap();
    assert_eq!(volume.kind, disk("/a:b,c.raw", Format::Raw, Some("squashfs")));
}

// B9
#[test]
fn suid_and_dev_are_told_and_left_out() {
    let (_, warnings) = mounted("nacelle.named", "a", "suid dev").unwrap();
    assert_eq!(
        warnings,
        [
            "mount at \"/data\": option suid is left out: a volume is always nosuid and nodev",
            "mount at \"/data\": option dev is left out: a volume is always nosuid and nodev",
        ]
    );
}

// B18, B21, B24
#[test]
fn options_of_mounts_are_refused_by_name() {
    let table: [(&str, &str, &str, &[&str]); 10] = [
        ("nacelle.named", "a", "format=raw", &["format goes with disk volumes alone, and this is a named volume"]),
        ("nacelle.named", "a", "fstype=ext4", &["fstype goes with disk volumes alone, and this is a named volume"]),
        ("nacelle.disk", "/a", "size=64m", &["size goes with tmpfs volumes alone, and this is a disk volume"]),
        (
            "nacelle.disk",
            "/a",
            "stat-virt=off",
            &["stat-virt goes with bind and named volumes alone, and this is a disk volume"],
        ),
        ("nacelle.disk", "/a", "format=raw format=raw", &["format is given twice"]),
        ("nacelle.disk", "/a", "uid=0 shared", &["option \"uid\" is unknown", "option \"shared\" is unknown"]),
        (
            "nacelle.disk",
            "a",
            "format=RAW fstype=",
            &[
                "disk format \"RAW\" is unknown: there are raw, qcow2 and vmdk",
                "disk image host path \"a\" is not absolute",
                "file system type is empty",
            ],
        ),
        (
            "nacelle.named",
            "../a",
            "host-perms=mirror stat-virt=off",
            &[
                "volume name \"../a\" does not begin with a letter or digit",
                "stat-virt \"off\" and host-perms \"mirror\" contradict each other: without an overlay a guest's chmod reaches the \
             host's file anyway, so there is nothing to mirror; drop one of them",
            ],
        ),
        ("nacelle.named", "a", "stat-virt=on", &["stat-virt \"on\" is unknown: there are strict, relaxed and off"]),
        (
            "nacelle.blob",
            "a",
            "",
            &["mount type \"nacelle.blob\" is unknown: there are nacelle.disk and nacelle.named"],
        ),
    ];
    for (kind, source, options, errors) in table {
        let errors: Vec<_> = errors.iter().map(|error| format!("mount at \"/data\": {error}")).collect();
        assert_eq!(mounted(kind, source, options).unwrap_err(), errors, "{kind} {source} {options}");
    }
    assert!(is_ours("nacelle.blob") && !is_ours("bind") && !is_ours("nacelle"));
    let errors = texts(&of_mount("nacelle.named", "a", "data", &[]).unwrap_err());
    assert_eq!(errors, ["mount at \"data\": guest path \"data\": it must be absolute"]);
    let errors = texts(&of_mount("nacelle.named", "a", "/dev/x", &[]).unwrap_err());
    assert!(errors[0].contains("at or below /dev"), "{errors:?}");
}

// B14
#[test]
fn debugging_shows_every_field() {
    let volume = volume("/data", disk("/a.raw", Format::Raw, Some("ext4")));
    let shown = format!("{volume:?}");
    for part in ["/data", "/a.raw", "Raw", "ext4", "readonly: false", "noexec: false"] {
        assert!(shown.contains(part), "{shown} lacks {part}");
    }
}
