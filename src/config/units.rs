//! Values with units, and how they are written in a file: `"100ms"`, `"64MiB"`.
//!
//! A number without a unit is refused: nobody should have to look up whether 1000 means milliseconds.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A size in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

impl Bytes {
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }

    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// For sizes of things in memory.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

/// More is a slip of the pen, and would overflow where sizes are added.
const BYTES_MAX: Bytes = Bytes(1 << 50);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected a size with its unit, such as \"64MiB\" or \"1.5MiB\" \
                                (B, KiB, MiB, GiB, TiB; kB, MB, GB, TB)";
        let text = text.trim();
        let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..unit_at], text[unit_at..].trim_start());
        if number == "0" && unit.is_empty() {
            return Ok(Self(0));
        }
        let unit_bytes = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, bytes)| *bytes);
        let size = unit_bytes.and_then(|unit_bytes| match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(unit_bytes),
            Err(_) => fraction(number, unit_bytes),
        });
        let size = size.map(Self).ok_or_else(|| format!("got {text:?}, {EXPECTED}"))?;
        if size <= BYTES_MAX { Ok(size) } else { Err(format!("got {text:?}, expected at most {BYTES_MAX}")) }
    }
}

/// `1.5` of a unit, in whole bytes.
fn fraction(number: &str, unit_bytes: u64) -> Option<u64> {
    let value = number.parse::<f64>().ok()? * unit_bytes as f64;
    (value < u64::MAX as f64).then_some(value.round() as u64)
}

impl fmt::Display for Bytes {
    /// The greatest binary unit that gives at most one digit after the point without loss, else bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, unit_bytes) in &UNITS[..4] {
            let exact = self.0.checked_mul(2).is_some_and(|doubled| doubled.is_multiple_of(*unit_bytes));
            if exact && self.0 >= *unit_bytes {
                let half = if self.0.is_multiple_of(*unit_bytes) { "" } else { ".5" };
                return write!(f, "{}{half}{unit}", self.0 / unit_bytes);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::deserialize(deserializer)
    }
}

/// Anything that is written as text: `#[serde(with = "units::text")]`.
pub mod text {
    use super::*;

    pub fn serialize<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: fmt::Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A duration: `#[serde(with = "units::duration")]`.
pub mod duration {
    use std::time::Duration;

    use super::*;

    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*value))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }

    /// More is a slip of the pen, and would overflow where it is added to the time.
    const MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

    /// Reads a duration with its unit.
    pub fn parse(text: &str) -> Result<Duration, String> {
        let expected =
            || format!("got {text:?}, expected a duration with its unit, such as \"100ms\", \"5s\" or \"1h\"");
        let duration = match text.trim().parse::<f64>() {
            Ok(_) => Err(expected()),
            Err(_) => humantime::parse_duration(text.trim()).map_err(|_| expected()),
        }?;
        if duration <= MAX { Ok(duration) } else { Err(format!("got {text:?}, expected at most 87600h (ten years)")) }
    }
}

/// A list that may also be written as one text with commas: `#[serde(with = "units::list")]`.
pub mod list {
    use super::*;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(String),
        List(Vec<String>),
    }

    pub fn serialize<S: Serializer>(value: &[String], serializer: S) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
        let written = Written::deserialize(deserializer)
            .map_err(|_| serde::de::Error::custom("expected a list of texts, or one text with commas"))?;
        Ok(match written {
            Written::Text(text) => {
                text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
            }
            Written::List(list) => list,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        let cases = [
            ("64MiB", 64 << 20, "64MiB"),
            ("1.5MiB", 3 << 19, "1.5MiB"),
            ("16 KiB", 16 << 10, "16KiB"),
            ("2GiB", 2 << 30, "2GiB"),
            ("1000B", 1000, "1000B"),
            ("10MB", 10_000_000, "10000000B"),
            ("64mib", 64 << 20, "64MiB"),
            ("0", 0, "0B"),
            ("0.1GiB", 107_374_182, "107374182B"),
        ];
        for (text, bytes, written) in cases {
            let size: Bytes = text.parse().unwrap();
            assert_eq!((size.0, size.to_string().as_str()), (bytes, written), "{text}");
            assert_eq!(written.parse(), Ok(size));
        }
    }

    #[test]
    fn size_without_unit_is_refused() {
        for text in ["64", "", "MiB", "64M", "-1MiB", "1.2.3MiB", "64 elephants", "99999999TiB", "1e9B"] {
            let message = text.parse::<Bytes>().unwrap_err();
            assert!(message.contains("with its unit") && message.contains(&format!("{text:?}")), "{message}");
        }
    }

    #[test]
    fn duration_without_unit_is_refused() {
        assert_eq!(duration::parse("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration::parse("1h 30m"), Ok(Duration::from_secs(5400)));
        for text in ["100", "0", "1.5", "", "fast", "10 elephants"] {
            assert!(duration::parse(text).unwrap_err().contains("with its unit"), "{text}");
        }
    }
}
