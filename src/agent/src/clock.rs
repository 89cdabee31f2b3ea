//! The guest's clock follows the host's, where the kernel offers one to follow (PTP_KVM).
//!
//! kvm-clock keeps the guest's time running at the host's rate, but not at its value: a step of the host's clock, or a
//! host that slept, is not seen. The PTP device is the host's clock read by a hypercall, so the offset is known to a
//! microsecond.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime, clock_gettime_dynamic, clock_settime};

/// Offset that is corrected; anything less is left to the clock's own rate.
const TOLERANCE_NS: i64 = 5_000_000;

/// Time between two looks at the host's clock. It wakes a guest that is idle otherwise, so it is long.
const INTERVAL: Duration = Duration::from_secs(30);

const NS: i64 = 1_000_000_000;

/// The host's clock.
pub struct HostClock(File);

impl HostClock {
    /// Opens the host's clock, if there is one and it answers.
    pub fn open() -> Option<Self> {
        let devices = fs::read_dir("/sys/class/ptp").ok()?;
        let kvm = devices.flatten().find(|device| {
            fs::read_to_string(device.path().join("clock_name")).is_ok_and(|name| name.trim() == "KVM virtual PTP")
        })?;
        let clock = Self(File::open(std::path::Path::new("/dev").join(kvm.file_name())).ok()?);
        // The device is there also where the host's clock source cannot be read from a guest.
        clock.offset_ns().ok().map(|_| clock)
    }

    /// How far the host's clock is ahead.
    fn offset_ns(&self) -> io::Result<i64> {
        let before = nanoseconds(clock_gettime(ClockId::Realtime));
        let host = nanoseconds(clock_gettime_dynamic(DynamicClockId::Dynamic(self.0.as_fd()))?);
        let after = nanoseconds(clock_gettime(ClockId::Realtime));
        Ok(host - before - (after - before) / 2)
    }

    /// Corrects the guest's clock now, and for ever.
    pub async fn follow(self) {
        loop {
            match self.offset_ns() {
                Ok(offset) if offset.abs() > TOLERANCE_NS => {
                    let now = nanoseconds(clock_gettime(ClockId::Realtime));
                    if let Err(error) = set_ns(now + offset) {
                        crate::say!("set clock: {error}");
                    }
                }
                Ok(_) => {}
                Err(error) => crate::say!("read clock of the host: {error}"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

/// Sets the guest's clock, nanoseconds since 1970, unless it is right already.
///
/// # Errors
/// What clock_settime(2) says.
pub fn step_to(realtime_ns: i64) -> io::Result<()> {
    let offset = realtime_ns - nanoseconds(clock_gettime(ClockId::Realtime));
    if offset.abs() > TOLERANCE_NS { set_ns(realtime_ns) } else { Ok(()) }
}

fn set_ns(realtime_ns: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: realtime_ns.div_euclid(NS), tv_nsec: realtime_ns.rem_euclid(NS) };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(NS).saturating_add(time.tv_nsec)
}
