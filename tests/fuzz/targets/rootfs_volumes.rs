//! Lists of volumes, mounts and roots of unknown origin: what is accepted is valid, and is read again from what it is written as.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacelle_rootfs::source::Request;
use nacelle_rootfs::volume::{Kind, Surface, decode, of_mount, validate};

fuzz_target!(|data: &[u8]| {
    if let Ok(decoded) = decode(data) {
        validate(&decoded.volumes, Surface::Text).expect("what was accepted is valid");
        let json = serde_json::to_vec(&decoded.volumes).expect("write");
        assert_eq!(decode(&json).expect("read again").volumes, decoded.volumes);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    // A mount: type, source, destination and options; a root: path, format, size and type.
    let mut fields = text.split('\t').map(str::to_owned);
    let mut next = || fields.next().unwrap_or_default();
    let (kind, source, destination) = (next(), next(), next());
    let options: Vec<_> = fields.collect();
    if let Ok((volume, _)) = of_mount(&kind, &source, &destination, &options) {
        validate(std::slice::from_ref(&volume), Surface::Mounts).expect("what was accepted is valid");
        assert!(!matches!(&volume.kind, Kind::Disk { host, .. } if !host.is_absolute()), "{volume:?}");
    }
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    let [format, upper_size, fstype] = [0, 1, 2].map(|index| options.get(index).and_then(given));
    if let Ok(source) = (Request { rootfs: given(&source), format, upper_size, fstype }).source() {
        source.validate().expect("what was accepted is valid");
    }
});
