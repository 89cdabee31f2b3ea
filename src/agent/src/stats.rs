//! The control files of a cgroup → containerd's `io.containerd.cgroups.v2.Metrics`.
//!
//! What the kernel does not offer stays zero. `max` is the largest number, as containerd's own reader has it.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use protobuf::MessageField;

use crate::cgroup::field;

/// `type_url` of the metrics; containerd takes no other for a cgroup v2 task.
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// Reads all metrics; `read` gives the content of a control file, if there is one.
pub fn metrics(read: impl Fn(&str) -> Option<String>, hugepage_sizes: &[String]) -> Metrics {
    Metrics {
        pids: section(read("pids.current"), |text| PidsStat {
            current: number(text),
            limit: read("pids.max").map_or(0, |text| number(&text)),
            ..Default::default()
        }),
        cpu: section(read("cpu.stat"), |text| CPUStat { psi: pressure(read("cpu.pressure")), ..cpu(text) }),
        memory: section(read("memory.stat"), |text| memory(text, &read)),
        memory_events: section(read("memory.events"), memory_events),
        io: section(read("io.stat"), |text| IOStat { psi: pressure(read("io.pressure")), ..io(text) }),
        hugetlb: hugepage_sizes.iter().filter_map(|size| hugetlb(size, &read)).collect(),
        ..Default::default()
    }
}

/// Sizes of the huge pages that the kernel has, as control files name them: `2MB`, `1GB`.
pub fn hugepage_sizes() -> Vec<String> {
    let names = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let mut sizes: Vec<String> = names
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()?;
            Some(match kib {
                0..1024 => format!("{kib}KB"),
                1024..1_048_576 => format!("{}MB", kib >> 10),
                _ => format!("{}GB", kib >> 20),
            })
        })
        .collect();
    sizes.sort();
    sizes
}

fn section<T>(text: Option<String>, parse: impl FnOnce(&str) -> T) -> MessageField<T> {
    text.as_deref().map(parse).into()
}

fn number(text: &str) -> u64 {
    let text = text.trim();
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

fn cpu(text: &str) -> CPUStat {
    let of = |key| field(text, key).unwrap_or(0);
    CPUStat {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        nr_bursts: of("nr_bursts"),
        burst_usec: of("burst_usec"),
        ..Default::default()
    }
}

fn memory(text: &str, read: impl Fn(&str) -> Option<String>) -> MemoryStat {
    let of = |key| field(text, key).unwrap_or(0);
    let file = |name| read(name).map_or(0, |text| number(&text));
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        // Split by the kind of page since Linux 5.9.
        workingset_refault: of("workingset_refault_anon") + of("workingset_refault_file"),
        workingset_activate: of("workingset_activate_anon") + of("workingset_activate_file"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: file("memory.current"),
        usage_limit: file("memory.max"),
        max_usage: file("memory.peak"),
        swap_usage: file("memory.swap.current"),
        swap_limit: file("memory.swap.max"),
        swap_max_usage: file("memory.swap.peak"),
        psi: pressure(read("memory.pressure")),
        ..Default::default()
    }
}

/// Pressure stall information (Linux, Documentation/accounting/psi.rst): lines of `some avg10=… avg60=… avg300=… total=…`
/// and `full …`, averages in percent, totals in microseconds. An empty file is a kernel that has it switched off.
fn pressure(text: Option<String>) -> MessageField<PSIStats> {
    let text = text.unwrap_or_default();
    let line = |kind: &str| -> MessageField<PSIData> {
        let words = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '));
        let of = |key: &str| words?.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        words
            .map(|_| PSIData {
                avg10: of("avg10").and_then(|text| text.parse().ok()).unwrap_or(0.0),
                avg60: of("avg60").and_then(|text| text.parse().ok()).unwrap_or(0.0),
                avg300: of("avg300").and_then(|text| text.parse().ok()).unwrap_or(0.0),
                total: of("total").map_or(0, number),
                ..Default::default()
            })
            .into()
    };
    let stats = PSIStats { some: line("some"), full: line("full"), ..Default::default() };
    if stats.some.is_some() { MessageField::some(stats) } else { MessageField::none() }
}

fn memory_events(text: &str) -> MemoryEvents {
    let of = |key| field(text, key).unwrap_or(0);
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..Default::default()
    }
}

/// Lines of `major:minor key=value …`.
fn io(text: &str) -> IOStat {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = number(value);
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        Some(entry)
    };
    IOStat { usage: text.lines().filter_map(entry).collect(), ..Default::default() }
}

fn hugetlb(size: &str, read: impl Fn(&str) -> Option<String>) -> Option<HugeTlbStat> {
    Some(HugeTlbStat {
        current: number(&read(&format!("hugetlb.{size}.current"))?),
        max: read(&format!("hugetlb.{size}.max")).map_or(0, |text| number(&text)),
        failcnt: read(&format!("hugetlb.{size}.events")).and_then(|text| field(&text, "max")).unwrap_or(0),
        pagesize: size.to_owned(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_there() {
        let file = |name: &str| {
            let text = match name {
                "pids.current" => "3\n",
                "pids.max" => "max\n",
                "cpu.stat" => {
                    "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_periods 2\nnr_throttled 1\nthrottled_usec 9\n"
                }
                "memory.stat" => {
                    "anon 1\nanon_thp 2\ninactive_file 5\nworkingset_refault_anon 1\nworkingset_refault_file 2\n"
                }
                "memory.current" => "4096\n",
                "memory.max" => "max\n",
                "memory.events" => "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n",
                "io.stat" => "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\nnonsense\n",
                "memory.pressure" => {
                    "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.25 total=7\n"
                }
                "io.pressure" => "",
                "hugetlb.2MB.current" => "0\n",
                "hugetlb.2MB.max" => "max\n",
                _ => return None,
            };
            Some(text.to_owned())
        };
        let metrics = metrics(file, &["1GB".into(), "2MB".into()]);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.throttled_usec), (10, 9));
        assert_eq!((metrics.memory.anon, metrics.memory.anon_thp, metrics.memory.workingset_refault), (1, 2, 3));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit, metrics.memory.swap_limit), (4096, u64::MAX, 0));
        assert_eq!((metrics.memory_events.max, metrics.memory_events.oom_kill), (7, 1));
        assert_eq!(metrics.io.usage.len(), 1);
        assert_eq!((metrics.io.usage[0].major, metrics.io.usage[0].wios), (254, 4));
        assert_eq!((metrics.memory.psi.some.avg10, metrics.memory.psi.some.total), (1.5, 42));
        assert_eq!((metrics.memory.psi.full.avg300, metrics.memory.psi.full.total), (0.25, 7));
        assert!(metrics.cpu.psi.is_none() && metrics.io.psi.is_none());
        assert_eq!(metrics.hugetlb.len(), 1);
        assert_eq!(metrics.hugetlb[0].pagesize, "2MB");
    }

    #[test]
    fn nothing_is_nothing() {
        assert_eq!(metrics(|_| None, &[]), Metrics::default());
    }
}
