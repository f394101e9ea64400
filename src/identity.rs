//! Who a node is: its name, its slot, the addresses of all slots, and member ids.
//!
//! Owns the rules by which text becomes an identity; it reads no configuration, environment or disk but the host name.
//! Invariants: a slot is at most [`SLOT_MAX`]; a [`PeerPattern`] expands to `host:port` for every slot it was checked with, and every
//! entry of a [`PeerList`] is one.
//! Absent: what is stored about a member (`storage`), and who belongs to the cluster (`cluster`).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::iter;
use std::path::Path;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::env::{Disk, OpenMode};
use crate::pb::log::Node;

/// The slot field of a member id that belongs to a reader: a member without a slot, which never votes.
pub const READER_SLOT: u16 = u16::MAX;
/// The greatest slot.
pub const SLOT_MAX: u16 = READER_SLOT - 1;

/// Bits of a member id that hold the slot.
const SLOT_BITS: u32 = 16;

/// Text that gives no identity. Every message says what was read, what was expected, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "this node has no name: identity.name, POD_NAME and the host name are all empty; expected one of them; set --name"
    )]
    NoName,
    #[error(
        "node name {name:?} (from {origin}) ends in no slot: expected digits after the last '-', as in kv-0; \
         set --slot, or --name to a name that ends so"
    )]
    NoOrdinal { name: String, origin: &'static str },
    #[error(
        "slot {slot} (from {origin}) is too large: expected at most {SLOT_MAX}; number the nodes from 0 or set --slot"
    )]
    SlotTooLarge { slot: String, origin: &'static str },
    #[error(
        "peer pattern {pattern:?}: {fault}; expected host:port with %d in the slot's place, as in \
         kv-%d.kv-headless:2380 or 127.0.0.1:2380%d; correct cluster.peers (--peers)"
    )]
    Pattern { pattern: String, fault: String },
    #[error(
        "peer pattern {pattern:?} gives slot {slot} the address {address:?}, but this node's name is {name:?}: expected \
         the address to begin with the name; correct cluster.peers (--peers), or set --slot if they are meant to differ"
    )]
    OtherName { pattern: String, slot: u16, address: String, name: String },
    #[error(
        "got {entry:?} in the list of members: {fault}; expected name=host:port, each name and each address once, as in \
         a=10.0.0.1:2380; correct cluster.members (--initial-cluster)"
    )]
    Member { entry: String, fault: String },
    #[error(
        "this node's name {name:?} is not in the list of members ({names}): expected one of them; correct cluster.members \
         (--initial-cluster), or the name (--name)"
    )]
    NotListed { name: String, names: String },
}

/// A node's name and where it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeName {
    pub text: String,
    /// For messages: `identity.name`, `POD_NAME` or `the host name`.
    pub origin: &'static str,
}

impl NodeName {
    /// The configured name, else the pod's, else the host's without its domain. Empty ones do not count.
    pub fn choose(configured: &str, pod_name: Option<&str>, host_name: &str) -> Result<Self, Error> {
        let host_label = host_name.split('.').next().unwrap_or_default();
        let candidates =
            [(configured, "identity.name"), (pod_name.unwrap_or_default(), "POD_NAME"), (host_label, "the host name")];
        candidates
            .into_iter()
            .map(|(text, origin)| Self { text: text.trim().to_owned(), origin })
            .find(|name| !name.text.is_empty())
            .ok_or(Error::NoName)
    }

    /// The digits after the last `-`.
    pub fn ordinal(&self) -> Result<u16, Error> {
        let digits = self.text.rsplit_once('-').map(|(_, digits)| digits).unwrap_or_default();
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Error::NoOrdinal { name: self.text.clone(), origin: self.origin });
        }
        match digits.parse() {
            Ok(slot) if slot <= SLOT_MAX => Ok(slot),
            _ => Err(Error::SlotTooLarge { slot: digits.to_owned(), origin: self.origin }),
        }
    }
}

/// The machine's host name, or nothing if it cannot be read.
pub fn host_name(disk: &dyn Disk) -> String {
    let name = read_small(disk, Path::new("/proc/sys/kernel/hostname")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim().to_owned()
}

/// A file of less than 64 KiB.
pub fn read_small(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    read_bounded(disk, path, 64 << 10)
}

/// A file of less than `bytes_max`, read until its end: those that the kernel makes up say that their length is 0.
pub fn read_bounded(disk: &dyn Disk, path: &Path, bytes_max: usize) -> io::Result<Vec<u8>> {
    let file = disk.open(path, OpenMode::Read)?;
    let mut bytes = vec![0; bytes_max];
    let mut filled = 0;
    loop {
        match file.read_at(&mut bytes[filled..], filled as u64)? {
            0 if filled == bytes_max => {
                let text = format!("{} KiB or more", bytes_max >> 10);
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
            }
            0 => break,
            read => filled += read,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Splits `host:port`; the host keeps an IPv6 address's brackets. None if either is missing or not of that form.
pub fn host_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port: u16 = port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok())??;
    let bracketed = host.len() > 2 && host.starts_with('[') && host.ends_with(']');
    let plain = !host.is_empty() && !host.contains([':', '[', ']']);
    let clean = !host.contains(|c: char| c.is_whitespace() || is_hostile(c) || matches!(c, '/' | '%' | ',' | '@'));
    ((bracketed || plain) && clean && port != 0).then_some((host, port))
}

/// Longest name, address or URL that a node tells others: of those of DNS, and some room.
const TEXT_BYTES_MAX: usize = 512;
/// URLs that a node may tell.
pub const URLS_MAX: usize = 16;

/// Whether a character changes what a terminal shows beside itself.
pub fn is_hostile(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// What another node has sent, as it may be shown: one line of bounded length, without anything that a terminal would obey.
pub fn shown(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 1000;
    text.chars().take(SHOWN_CHARS_MAX).map(|c| if is_hostile(c) { '\u{fffd}' } else { c }).collect()
}

/// Refuses what another node says of itself, if it could not be shown or dialled: it would enter the membership, every member's log,
/// and people's terminals.
pub fn check_node(node: &Node) -> Result<(), String> {
    let check = |what: &str, text: &str| match text.len() <= TEXT_BYTES_MAX && !text.contains(is_hostile) {
        true => Ok(()),
        false => Err(format!("its {what} {:?} is too long, or has control characters", shown(text))),
    };
    check("name", &node.name)?;
    check("peer address", &node.peer_address)?;
    node.client_urls.iter().try_for_each(|url| check("client URL", url))?;
    let more = &node.more_peer_addresses;
    more.iter().try_for_each(|address| check("peer address", address))?;
    let told = Some(&node.peer_address).filter(|address| !address.is_empty());
    if let Some(address) = told.into_iter().chain(more).find(|address| host_port(address).is_none()) {
        return Err(format!("its peer address {address:?} is no host:port"));
    }
    if node.reservation.is_some() {
        return Err("it says that its id is reserved, which only the membership can".into());
    }
    if node.client_urls.len() > URLS_MAX {
        return Err(format!("it names {} client URLs, expected at most {URLS_MAX}", node.client_urls.len()));
    }
    if more.len() >= URLS_MAX {
        return Err(format!("it names {} peer addresses, expected at most {URLS_MAX}", more.len() + 1));
    }
    Ok(())
}

/// Where peers find a node, in the order in which they try.
pub fn peer_addresses(node: &Node) -> impl Iterator<Item = &String> {
    iter::once(&node.peer_address).chain(&node.more_peer_addresses)
}

/// The address of every slot: `host:port` in which each `%d` stands for the slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerPattern(String);

impl FromStr for PeerPattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fault = |fault: &str| Error::Pattern { pattern: text.to_owned(), fault: fault.to_owned() };
        if text.contains("://") {
            return Err(fault("it has a scheme"));
        }
        if !text.contains("%d") {
            return Err(fault("it has no %d, so all slots would share one address"));
        }
        if text.replace("%d", "").contains('%') {
            return Err(fault("it has a % that is not part of %d"));
        }
        let pattern = Self(text.to_owned());
        // Slot 1, for slot 0 may be the port 0 of a pattern such as `host:%d`.
        pattern.check(1)?;
        Ok(pattern)
    }
}

impl fmt::Display for PeerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl PeerPattern {
    /// The address of `slot`.
    pub fn expand(&self, slot: u16) -> String {
        self.0.replace("%d", &slot.to_string())
    }

    /// Refuses a slot whose address is not `host:port`; a `%d` in the port can make it too large.
    pub fn check(&self, slot: u16) -> Result<(), Error> {
        let address = self.expand(slot);
        match host_port(&address) {
            Some(_) => Ok(()),
            None => {
                let fault = format!("slot {slot} becomes {address:?}, which has no host or no valid port");
                Err(Error::Pattern { pattern: self.0.clone(), fault })
            }
        }
    }

    /// The address under which the name service lists all slots at once: `kv-%d.kv-headless:2380` has
    /// `kv-headless:2380`. None unless the slot is in the first label and nowhere else.
    pub fn headless(&self) -> Option<&str> {
        let (label, rest) = self.0.split_once('.')?;
        (label.contains("%d") && !rest.contains("%d") && host_port(rest).is_some()).then_some(rest)
    }

    /// Compares the own entry with the own name, as text, where the pattern gives slots names.
    pub fn check_own(&self, slot: u16, name: &str) -> Result<(), Error> {
        let first_label = self.0.split(['.', ':']).next().unwrap_or_default();
        let address = self.expand(slot);
        let host = host_port(&address).map_or("", |(host, _)| host);
        let same = host == name || host.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
        if same || !first_label.contains("%d") || host.starts_with('[') {
            return Ok(());
        }
        Err(Error::OtherName { pattern: self.0.clone(), slot, address, name: name.to_owned() })
    }
}

/// The first members of a cluster by name, which may be any. Their order is that of the names, so that all who were given the same list
/// count alike: a member's place in it is its slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerList(BTreeMap<String, String>);

impl PeerList {
    /// Reads entries `name=host:port`.
    pub fn new(entries: &[String]) -> Result<Self, Error> {
        let mut list = BTreeMap::new();
        for entry in entries {
            let fault = |fault: &str| Error::Member { entry: entry.clone(), fault: fault.to_owned() };
            let (name, address) = entry.split_once('=').ok_or_else(|| fault("it has no ="))?;
            if name.is_empty() || name.len() > TEXT_BYTES_MAX || name.contains(is_hostile) {
                return Err(fault("its name is empty, too long, or has control characters"));
            }
            if host_port(address).is_none() {
                return Err(fault("it has no host or no valid port"));
            }
            if list.values().any(|other| other == address) {
                return Err(fault("another member has its address"));
            }
            if list.insert(name.to_owned(), address.to_owned()).is_some() {
                return Err(fault("another member has its name"));
            }
            if list.len() > LISTED_MAX {
                return Err(fault("the list is longer than any cluster"));
            }
        }
        Ok(Self(list))
    }

    /// The slot of the member of that name.
    pub fn slot(&self, name: &str) -> Result<u16, Error> {
        let place = self.0.keys().position(|listed| listed == name);
        place.and_then(|place| u16::try_from(place).ok()).ok_or_else(|| Error::NotListed {
            name: name.to_owned(),
            names: self.0.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    fn address(&self, slot: u16) -> Option<&String> {
        self.0.values().nth(slot.into())
    }

    /// Slot, name and address of each, by slot.
    pub fn entries(&self) -> impl Iterator<Item = (u16, &str, &str)> {
        self.0.iter().zip(0..).map(|((name, address), slot)| (slot, name.as_str(), address.as_str()))
    }

    /// How many members it has.
    pub fn size(&self) -> u16 {
        self.0.len() as u16
    }

    /// Stands for the list and a token; never 0. Who was given others forms no cluster with who was given these.
    pub fn fingerprint(&self, token: &str) -> u64 {
        let mut hash = Sha256::new();
        for text in self.0.iter().flat_map(|(name, address)| [name.as_str(), address]).chain([token]) {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        let head: [u8; 8] = hash.finalize()[..8].try_into().expect("a digest has 32 bytes");
        u64::from_le_bytes(head).max(1)
    }
}

/// More members than a list may name.
const LISTED_MAX: usize = 1000;

/// Where the slots of a cluster are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerAddresses {
    /// Of any number of slots.
    Pattern(PeerPattern),
    /// Of the first members, and of no others.
    List(PeerList),
}

impl PeerAddresses {
    /// The address of `slot`, if it has one.
    pub fn expand(&self, slot: u16) -> Option<String> {
        match self {
            Self::Pattern(pattern) => Some(pattern.expand(slot)),
            Self::List(list) => list.address(slot).cloned(),
        }
    }

    /// As [`PeerPattern::headless`]; a list has none.
    pub fn headless(&self) -> Option<&str> {
        match self {
            Self::Pattern(pattern) => pattern.headless(),
            Self::List(_) => None,
        }
    }
}

/// Makes a member id from 48 bits of `random`; never 0, which Raft keeps for nobody.
pub fn mint(random: u64, slot: u16) -> u64 {
    // A shift drops the upper bits; the lowest random bit stands in if all that are left are zero.
    (random << SLOT_BITS).max(1 << SLOT_BITS) | u64::from(slot)
}

/// The slot of a member; [`READER_SLOT`] for a reader.
pub fn slot_of(member_id: u64) -> u16 {
    member_id as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        NodeName::choose(text, None, "").unwrap()
    }

    #[test]
    fn name_comes_from_setting_then_pod_then_host() {
        let cases = [
            (("kv-1", Some("kv-2"), "kv-3"), ("kv-1", "identity.name")),
            (("", Some("kv-2"), "kv-3"), ("kv-2", "POD_NAME")),
            (("", Some(""), "kv-3.example.org"), ("kv-3", "the host name")),
            (("", None, "kv-3"), ("kv-3", "the host name")),
        ];
        for ((configured, pod, host), (text, origin)) in cases {
            assert_eq!(NodeName::choose(configured, pod, host), Ok(NodeName { text: text.to_owned(), origin }));
        }
        assert_eq!(NodeName::choose("", None, " "), Err(Error::NoName));
    }

    #[test]
    fn slot_is_digits_after_last_dash() {
        for (text, slot) in [("kv-0", 0), ("my-kv-12", 12), ("kv-65534", 65534), ("kv-007", 7)] {
            assert_eq!(name(text).ordinal(), Ok(slot), "{text}");
        }
        for text in ["kv", "kv0", "kv-", "kv-a", "kv-0a", "7", "kv-+1"] {
            let message = name(text).ordinal().unwrap_err().to_string();
            assert!(message.contains(text) && message.contains("as in kv-0"), "{message}");
            assert!(message.contains("--slot"), "{message}");
        }
        for text in ["kv-65535", "kv-99999999999999999999"] {
            assert!(matches!(name(text).ordinal(), Err(Error::SlotTooLarge { .. })), "{text}");
        }
    }

    #[test]
    fn pattern_expands_everywhere() {
        let cases = [
            ("kv-%d.kv-headless.ns:2380", 2, "kv-2.kv-headless.ns:2380", Some("kv-headless.ns:2380")),
            ("127.0.0.1:2380%d", 3, "127.0.0.1:23803", None),
            ("%d.node-%d.example:2380", 1, "1.node-1.example:2380", None),
            ("node%d:2380", 0, "node0:2380", None),
            ("10.0.0.%d:2380", 4, "10.0.0.4:2380", None),
            ("kv-%d.kv:238%d", 1, "kv-1.kv:2381", None),
            ("[fd00::%d]:2380", 7, "[fd00::7]:2380", None),
        ];
        for (text, slot, address, headless) in cases {
            let pattern: PeerPattern = text.parse().unwrap();
            assert_eq!(pattern.expand(slot), address);
            assert_eq!(pattern.headless(), headless, "{text}");
            assert_eq!(pattern.to_string(), text);
        }
    }

    #[test]
    fn bad_pattern_says_why() {
        let cases = [
            ("kv:2380", "no %d"),
            ("", "no %d"),
            ("http://kv-%d:2380", "scheme"),
            ("kv-%d-%s:2380", "not part of %d"),
            ("kv-%d:2380%", "not part of %d"),
            ("kv-%%d:2380", "not part of %d"),
            ("kv-%d", "no host or no valid port"),
            ("kv-%d:", "no host or no valid port"),
            (":238%d", "no host or no valid port"),
            ("kv-%d:client", "no host or no valid port"),
            ("kv:9999%d", "no host or no valid port"),
            ("fd00::%d:2380", "no host or no valid port"),
            ("kv-%d:2380/x", "no host or no valid port"),
        ];
        for (text, why) in cases {
            let message = text.parse::<PeerPattern>().unwrap_err().to_string();
            assert!(message.contains(why) && message.contains("cluster.peers"), "{text}: {message}");
        }
    }

    #[test]
    fn port_that_overflows_is_refused_for_that_slot_only() {
        let pattern: PeerPattern = "127.0.0.1:2380%d".parse().unwrap();
        assert_eq!(pattern.check(9), Ok(()));
        assert!(pattern.check(10).is_err());
    }

    #[test]
    fn own_entry_is_compared_where_names_exist() {
        let cases = [
            ("kv-%d.kv-headless:2380", "kv-2", true),
            ("kv-%d:2380", "kv-2", true),
            ("kv-%d.a.b:2380", "kv-2.a", true),
            ("kv-%d.kv-headless:2380", "db-2", false),
            ("kv-%d.kv-headless:2380", "kv-22", false),
            ("kv-%d.kv-headless:2380", "kv", false),
            ("127.0.0.1:238%d", "db-2", true),
            ("10.0.0.%d:2380", "db-2", true),
            ("[fd00::%d]:2380", "db-2", true),
        ];
        for (text, own, fits) in cases {
            assert_eq!(text.parse::<PeerPattern>().unwrap().check_own(2, own).is_ok(), fits, "{text} {own}");
        }
    }

    fn list(text: &str) -> Result<PeerList, Error> {
        PeerList::new(&text.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn all_who_are_given_one_list_count_alike() {
        let (one, other) =
            (list("b=h2:1,a=[::1]:2,infra0=h3:3").unwrap(), list("infra0=h3:3,a=[::1]:2,b=h2:1").unwrap());
        assert_eq!(one, other);
        assert_eq!(["a", "b", "infra0"].map(|name| one.slot(name).unwrap()), [0, 1, 2]);
        let places = PeerAddresses::List(one.clone());
        assert_eq!((places.expand(0).as_deref(), places.expand(3), one.size()), (Some("[::1]:2"), None, 3));
        let message = one.slot("c").unwrap_err().to_string();
        assert!(message.contains("\"c\"") && message.contains("a, b, infra0") && message.contains("--initial-cluster"));
    }

    #[test]
    fn another_list_or_token_has_another_fingerprint() {
        let texts = ["a=h:1", "a=h:2", "b=h:1", "a=h:1,b=h:2", "a=h:1,bb=h:2"];
        let mut prints: Vec<u64> = texts.iter().map(|text| list(text).unwrap().fingerprint("t")).collect();
        prints.push(list("a=h:1").unwrap().fingerprint("u"));
        prints.sort_unstable();
        prints.dedup();
        assert_eq!(prints.len(), texts.len() + 1);
        assert_eq!(list("a=h:1,b=h:2").unwrap().fingerprint("t"), list("b=h:2,a=h:1").unwrap().fingerprint("t"));
    }

    #[test]
    fn bad_entry_of_a_list_says_why() {
        for (text, why) in [
            ("a", "no ="),
            ("=h:1", "name is empty"),
            ("a=h", "no host or no valid port"),
            ("a=http://h:1", "no host or no valid port"),
            ("a=h:1,a=h:2", "has its name"),
            ("a=h:1,b=h:1", "has its address"),
        ] {
            let message = list(text).unwrap_err().to_string();
            assert!(message.contains(why) && message.contains("cluster.members"), "{text}: {message}");
        }
    }

    #[test]
    fn member_id_holds_slot_and_is_never_zero() {
        for random in [0, 1, u64::MAX, 0xffff_0000_0000_0000, 0x1234_5678_9abc_def0] {
            for slot in [0, 1, SLOT_MAX, READER_SLOT] {
                let id = mint(random, slot);
                assert_eq!(slot_of(id), slot);
                assert_ne!(id >> SLOT_BITS, 0, "random part of {random:x}");
            }
        }
        assert_eq!(mint(0x1234_5678_9abc_def0, 5), 0x5678_9abc_def0_0005);
    }

    #[test]
    fn host_name_of_this_machine_can_be_read() {
        assert_ne!(host_name(&crate::env::disk::RealDisk), "");
    }
}
