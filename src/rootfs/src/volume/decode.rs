//! JSON → volumes.
//!
//! ```json
//! [
//!   {"type": "Bind", "host": "/srv/a", "guest": "/a", "options": {"readonly": true, "noexec": false}},
//!   {"type": "Named", "name": "cache_1", "guest": "/cache"},
//!   {"type": "Tmpfs", "guest": "/tmp", "size_mib": 64},
//!   {"type": "DiskImage", "host": "/srv/data.qcow2", "guest": "/data", "format": "Qcow2", "fstype": "ext4"}
//! ]
//! ```
//!
//! Types and keys may be written in kebab case as well (`disk-image`, `size-mib`). An older form has `readonly` beside `type`: it counts
//! when there are no `options`. Keys that nobody knows are told and left out; keys of another kind of volume are errors.

use serde_json::{Map, Value};

use super::validate::faults;
use super::{Fault, Kind, Place, Policies, Surface, VOLUMES, Volume, VolumeError};
use crate::path::GuestPath;
use crate::source::parse_mib;

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    /// The volumes, validated for [`Surface::Text`].
    pub volumes: Vec<Volume>,
    /// What was left out, and why.
    pub warnings: Vec<String>,
}

/// Reads and validates a list.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn decode(json: &[u8]) -> Result<Decoded, Vec<VolumeError>> {
    let whole = |why| vec![VolumeError { at: Place::List, why }];
    let list: Vec<Value> = serde_json::from_slice(json).map_err(|e| whole(Fault::Json(e.to_string())))?;
    if list.len() > VOLUMES {
        return Err(whole(Fault::TooMany));
    }
    let mut errors = Vec::new();
    let mut read = Vec::new();
    let mut warnings = Vec::new();
    for (number, value) in list.into_iter().enumerate() {
        let mut entry = Entry::default();
        if let Some(volume) = entry.read(value) {
            read.push((Place::Number(number), volume));
        }
        warnings.extend(entry.warnings.into_iter().map(|warning| format!("volume {number}: {warning}")));
        errors.extend(entry.faults.into_iter().map(|why| VolumeError { at: Place::Number(number), why }));
    }
    let placed: Vec<_> = read.iter().map(|(place, volume)| (place.clone(), volume)).collect();
    errors.extend(faults(&placed, Surface::Text));
    if errors.is_empty() {
        Ok(Decoded { volumes: read.into_iter().map(|(_, volume)| volume).collect(), warnings })
    } else {
        Err(errors)
    }
}

/// The keys that go with some kinds alone, and with which.
const KEYS: [(&str, &[&str], &str); 7] = [
    ("host", &["bind", "disk"], "bind and disk"),
    ("name", &["named"], "named"),
    ("size_mib", &["tmpfs"], "tmpfs"),
    ("format", &["disk"], "disk"),
    ("fstype", &["disk"], "disk"),
    (STAT_VIRT, &["bind", "named"], "bind and named"),
    (HOST_PERMS, &["bind", "named"], "bind and named"),
];
const STAT_VIRT: &str = "stat_virtualization";
const HOST_PERMS: &str = "host_permissions";

/// One entry of the list while it is read.
#[derive(Default)]
struct Entry {
    fields: Map<String, Value>,
    faults: Vec<Fault>,
    warnings: Vec<String>,
}

impl Entry {
    /// The volume as far as it can be told; what is wrong with it is in `faults`.
    fn read(&mut self, value: Value) -> Option<Volume> {
        let Value::Object(object) = value else {
            self.faults.push(Fault::Json("it is not an object".into()));
            return None;
        };
        self.collect(object);
        let kind = self.text("type", "")?;
        let kind = match kind.as_str() {
            "Bind" | "bind" => "bind",
            "Named" | "named" => "named",
            "Tmpfs" | "tmpfs" => "tmpfs",
            "DiskImage" | "disk-image" => "disk",
            _ => {
                let there_are = "there are Bind, Named, Tmpfs and DiskImage";
                self.faults.push(Fault::UnknownKind { what: "type", value: kind, there_are });
                return None;
            }
        };
        for (key, kinds, wanted) in KEYS {
            if !kinds.contains(&kind) && self.fields.remove(key).is_some() {
                self.faults.push(Fault::Misplaced { key: key.into(), wanted, kind });
            }
        }
        let guest = self.text("guest", kind).and_then(|text| match GuestPath::parse(text.as_bytes()) {
            Ok(guest) => Some(guest),
            Err(why) => {
                self.faults.push(Fault::Guest { path: text, why });
                None
            }
        });
        let (readonly, noexec) = self.options();
        let kind = self.kind(kind);
        for key in std::mem::take(&mut self.fields).keys() {
            self.warnings.push(format!("key {key:?} is unknown and left out"));
        }
        Some(Volume { guest: guest?, kind: kind?, readonly, noexec })
    }

    /// Takes the fields, by their names in snake case. `null` is as good as leaving one out.
    fn collect(&mut self, object: Map<String, Value>) {
        for (key, value) in object.into_iter().filter(|(_, value)| !value.is_null()) {
            let name = match key.replace('-', "_") {
                short if short == "stat_virt" => STAT_VIRT.to_owned(),
                short if short == "host_perms" => HOST_PERMS.to_owned(),
                name => name,
            };
            if self.fields.insert(name, value).is_some() {
                self.faults.push(Fault::Twice(key));
            }
        }
    }

    fn kind(&mut self, kind: &'static str) -> Option<Kind> {
        Some(match kind {
            "bind" => {
                let (host, policies) = (self.text("host", kind), self.policies());
                Kind::Bind { host: host?.into(), policies }
            }
            "named" => {
                let (name, policies) = (self.text("name", kind), self.policies());
                Kind::Named { name: name?, policies }
            }
            "tmpfs" => Kind::Tmpfs { size_mib: self.size() },
            _ => {
                let (host, format) = (self.text("host", kind), self.text("format", kind));
                let fstype = if self.fields.contains_key("fstype") { self.text("fstype", kind) } else { None };
                let format = format.and_then(|text| {
                    let read = serde_json::from_value(Value::String(text.clone()));
                    let unknown = |_| self.faults.push(Fault::Format(crate::disk::UnknownFormat(text)));
                    read.map_err(unknown).ok()
                });
                Kind::Disk { host: host?.into(), format: format?, fstype }
            }
        })
    }

    /// A text that must be there.
    fn text(&mut self, key: &'static str, kind: &'static str) -> Option<String> {
        match self.fields.remove(key) {
            Some(Value::String(text)) => return Some(text),
            Some(_) => self.faults.push(Fault::Json(format!("{key} is not a text"))),
            None if kind.is_empty() => self.faults.push(Fault::Json(format!("{key} is missing"))),
            None => self.faults.push(Fault::Missing { key, kind }),
        }
        None
    }

    /// A text that may be there, as something else.
    fn parsed<T: std::str::FromStr>(&mut self, key: &'static str) -> Option<T>
    where
        Fault: From<T::Err>,
    {
        self.fields.get(key)?;
        let parsed = self.text(key, "")?.parse();
        parsed.map_err(|e| self.faults.push(Fault::from(e))).ok()
    }

    fn policies(&mut self) -> Policies {
        Policies { stat_virt: self.parsed(STAT_VIRT), host_perms: self.parsed(HOST_PERMS) }
    }

    /// A number of MiB, or a text as [`parse_mib`] reads it.
    fn size(&mut self) -> Option<u32> {
        let text = match self.fields.remove("size_mib")? {
            Value::Number(number) => number.to_string(),
            Value::String(text) => text,
            other => other.to_string(),
        };
        parse_mib(&text).map_err(|e| self.faults.push(Fault::Size(e))).ok()
    }

    /// `readonly` and `noexec`.
    fn options(&mut self) -> (bool, bool) {
        let legacy = self.fields.remove("readonly");
        let mut options = match self.fields.remove("options") {
            Some(Value::Object(options)) => options,
            Some(_) => {
                self.faults.push(Fault::Json("options is not an object".into()));
                return (false, false);
            }
            None => return (self.flag("readonly", legacy), false),
        };
        if legacy.is_some() {
            self.warnings.push("readonly beside options is left out".into());
        }
        let (readonly, noexec) = (options.remove("readonly"), options.remove("noexec"));
        let flags = (self.flag("readonly", readonly), self.flag("noexec", noexec));
        for (key, value) in options {
            match key.as_str() {
                "nosuid" | "nodev" if value == Value::Bool(false) => {
                    self.warnings.push(format!("{key} holds for every volume and cannot be turned off"));
                }
                "nosuid" | "nodev" => {}
                _ => self.warnings.push(format!("option {key:?} is unknown and left out")),
            }
        }
        flags
    }

    fn flag(&mut self, key: &str, value: Option<Value>) -> bool {
        match value {
            None | Some(Value::Null) => false,
            Some(Value::Bool(flag)) => flag,
            Some(_) => {
                self.faults.push(Fault::Json(format!("{key} is neither true nor false")));
                false
            }
        }
    }
}
