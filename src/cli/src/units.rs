//! Numbers for people.

/// Bytes in the largest binary unit that keeps a digit before the point.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Reads a size such as `20G`: a whole number of bytes, or of K, M, G or T, which are binary multiples (`Gi` and `GiB` as well).
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_uppercase();
    let factor: u64 = match unit.trim_end_matches("B").trim_end_matches('I') {
        "" if unit.len() < 2 && unit != "I" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err(format!("unknown unit {unit}: use K, M, G or T")),
    };
    let count: u64 = digits.parse().map_err(|_| format!("{digits:?} is not a whole number"))?;
    count.checked_mul(factor).ok_or_else(|| "too large".to_owned())
}

/// A name as people can see it: what a terminal would obey is escaped.
pub fn name(bytes: &[u8]) -> String {
    let mut out = String::new();
    for c in String::from_utf8_lossy(bytes).chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Microseconds as milliseconds.
pub fn millis(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes() {
        assert_eq!(parse_bytes("0"), Ok(0));
        assert_eq!(parse_bytes("7B"), Ok(7));
        assert_eq!(parse_bytes("20G"), Ok(20 << 30));
        assert_eq!(parse_bytes("8Gi"), Ok(8 << 30));
        assert_eq!(parse_bytes("1MiB"), Ok(1 << 20));
        assert!(["G", "1X", "-1", "1I", "1IB", "", "1GG"].iter().all(|text| parse_bytes(text).is_err()));
        assert!(parse_bytes("99999999999T").is_err());
    }

    #[test]
    fn names_cannot_speak_to_the_terminal() {
        assert_eq!(name("plain ü".as_bytes()), "plain ü");
        assert_eq!(name(b"\x1b[2J\n\xff"), "\\u{1b}[2J\\n\u{fffd}");
    }

    #[test]
    fn picks_a_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
        assert_eq!(millis(1250), "1.2 ms");
    }
}
