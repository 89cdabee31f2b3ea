//! OCI resource limits → what is written to the control files of a cgroup (v2). A plan, without any effect.
//!
//! The OCI configuration speaks cgroup v1; the conversions are those of its runtime specification
//! (config-linux.md) and of the kernel's Documentation/admin-guide/cgroup-v2.rst.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use thiserror::Error;

/// Default period of the CPU bandwidth controller, microseconds.
const PERIOD: u64 = 100_000;

/// Limits that make no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LimitError {
    /// memory.swap is the sum of memory and swap, so it cannot be below the memory limit.
    #[error("memory and swap together ({swap}) are less than the memory limit ({limit})")]
    Swap {
        /// Memory and swap, bytes.
        swap: i64,
        /// Memory, bytes.
        limit: i64,
    },
    /// A key of `unified` that is not a file name.
    #[error("{0:?} is not the name of a control file")]
    File(String),
}

/// One write to a control file.
#[derive(Debug, PartialEq, Eq)]
pub struct Write {
    /// Name of the file in the cgroup's directory.
    pub file: String,
    /// What is written.
    pub value: String,
    /// The limit holds by itself, or is only a hint, where the kernel has no such file.
    pub optional: bool,
}

/// The writes that establish `resources`, in order.
///
/// # Errors
/// [`LimitError`]
pub fn writes(resources: &LinuxResources) -> Result<Vec<Write>, LimitError> {
    let mut plan = Plan(Vec::new());
    if let Some(memory) = resources.memory() {
        plan.memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        plan.cpu(cpu);
    }
    if let Some(pids) = resources.pids() {
        plan.set("pids.max", max(pids.limit()));
    }
    if let Some(io) = resources.block_io() {
        plan.io(io);
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        // A kernel that has no pages of this size gives none away.
        plan.optional(&format!("hugetlb.{}.max", file_name(huge.page_size())?), huge.limit());
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        plan.set(file_name(file)?, value);
    }
    Ok(plan.0)
}

fn file_name(text: &str) -> Result<&str, LimitError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !text.is_empty() && text.chars().all(fits) && !text.starts_with('.') && !text.starts_with("cgroup.") {
        Ok(text)
    } else {
        Err(LimitError::File(text.chars().take(80).collect()))
    }
}

/// A limit, or `max` for -1 and everything else that is no limit.
fn max(limit: i64) -> String {
    if limit > 0 { limit.to_string() } else { "max".to_owned() }
}

struct Plan(Vec<Write>);

impl Plan {
    fn set(&mut self, file: &str, value: impl ToString) {
        self.0.push(Write { file: file.to_owned(), value: value.to_string(), optional: false });
    }

    fn optional(&mut self, file: &str, value: impl ToString) {
        self.0.push(Write { file: file.to_owned(), value: value.to_string(), optional: true });
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), LimitError> {
        let limit = memory.limit().unwrap_or(0);
        if limit != 0 {
            self.set("memory.max", max(limit));
        }
        match memory.swap().unwrap_or(0) {
            0 => {}
            // Without swap in the kernel there is nothing to limit.
            swap if swap < 0 => self.optional("memory.swap.max", "max"),
            swap if limit > 0 && swap < limit => return Err(LimitError::Swap { swap, limit }),
            swap if limit > 0 => self.optional("memory.swap.max", swap - limit),
            _ => {}
        }
        if let Some(reservation) = memory.reservation().filter(|bytes| *bytes != 0) {
            self.set("memory.low", max(reservation));
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) {
        if let Some(idle) = cpu.idle() {
            self.set("cpu.idle", idle);
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            // 2 … 262144 onto 1 … 10000.
            let shares = shares.clamp(2, 262_144);
            self.set("cpu.weight", 1 + (shares - 2) * 9999 / 262_142);
        }
        let quota = cpu.quota().unwrap_or(0);
        let period = cpu.period().filter(|period| *period != 0);
        if quota != 0 || period.is_some() {
            self.set("cpu.max", format!("{} {}", max(quota), period.unwrap_or(PERIOD)));
        }
        if let Some(burst) = cpu.burst() {
            self.set("cpu.max.burst", burst);
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                self.set(file, list);
            }
        }
    }

    fn io(&mut self, io: &LinuxBlockIo) {
        if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
            // 10 … 1000 onto 1 … 10000.
            let weight = u64::from(weight.clamp(10, 1000));
            self.optional("io.weight", 1 + (weight - 10) * 9999 / 990);
        }
        let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
            ("rbps", io.throttle_read_bps_device()),
            ("wbps", io.throttle_write_bps_device()),
            ("riops", io.throttle_read_iops_device()),
            ("wiops", io.throttle_write_iops_device()),
        ];
        for (key, devices) in throttles {
            for device in devices.iter().flatten() {
                self.set("io.max", format!("{}:{} {key}={}", device.major(), device.minor(), device.rate()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<Vec<(String, String, bool)>, LimitError> {
        let resources: LinuxResources = serde_json::from_str(json).expect("resources");
        Ok(writes(&resources)?.into_iter().map(|w| (w.file, w.value, w.optional)).collect())
    }

    fn one(file: &str, value: &str) -> (String, String, bool) {
        (file.to_owned(), value.to_owned(), false)
    }

    #[test]
    fn memory_and_swap() {
        let swap = |value: &str| ("memory.swap.max".to_owned(), value.to_owned(), true);
        assert_eq!(
            plan(r#"{"memory":{"limit":100,"swap":300,"reservation":50}}"#),
            Ok(vec![one("memory.max", "100"), swap("200"), one("memory.low", "50")])
        );
        assert_eq!(plan(r#"{"memory":{"limit":-1,"swap":-1}}"#), Ok(vec![one("memory.max", "max"), swap("max")]));
        assert_eq!(plan(r#"{"memory":{"limit":100,"swap":99}}"#), Err(LimitError::Swap { swap: 99, limit: 100 }));
    }

    #[test]
    fn cpu_shares_quota_and_period() {
        assert_eq!(plan(r#"{"cpu":{"shares":2}}"#), Ok(vec![one("cpu.weight", "1")]));
        assert_eq!(plan(r#"{"cpu":{"shares":1024}}"#), Ok(vec![one("cpu.weight", "39")]));
        assert_eq!(plan(r#"{"cpu":{"shares":262144}}"#), Ok(vec![one("cpu.weight", "10000")]));
        assert_eq!(plan(r#"{"cpu":{"shares":18446744073709551615}}"#), Ok(vec![one("cpu.weight", "10000")]));
        assert_eq!(plan(r#"{"cpu":{"quota":50000}}"#), Ok(vec![one("cpu.max", "50000 100000")]));
        assert_eq!(plan(r#"{"cpu":{"quota":-1,"period":20000}}"#), Ok(vec![one("cpu.max", "max 20000")]));
        assert_eq!(plan(r#"{"cpu":{"quota":0,"period":0,"cpus":"","mems":""}}"#), Ok(vec![]));
    }

    #[test]
    fn pids_and_hugepages() {
        assert_eq!(plan(r#"{"pids":{"limit":7}}"#), Ok(vec![one("pids.max", "7")]));
        assert_eq!(plan(r#"{"pids":{"limit":-1}}"#), Ok(vec![one("pids.max", "max")]));
        assert_eq!(
            plan(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#),
            Ok(vec![("hugetlb.2MB.max".into(), "0".into(), true)])
        );
    }

    #[test]
    fn unified_files_stay_in_their_directory() {
        assert_eq!(plan(r#"{"unified":{"memory.oom.group":"1"}}"#), Ok(vec![one("memory.oom.group", "1")]));
        for bad in ["../memory.max", "a/b", "", ".", "cgroup.procs"] {
            let json = format!(r#"{{"unified":{{"{bad}":"1"}}}}"#);
            assert_eq!(plan(&json), Err(LimitError::File(bad.into())));
        }
    }
}
