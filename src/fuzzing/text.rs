//! Text that people write (settings, names, patterns), and the bytes of a client's connection.

use std::path::{Path, PathBuf};

use crate::config::{self, Sources};
use crate::env::Disk as _;
use crate::env::sim::SimDisk;
use crate::identity::{NodeName, PeerPattern, SLOT_MAX, host_port};
use crate::server::authority::Filter;

/// A settings file: refused with a text, or its printed form gives the same settings.
pub(super) fn config(data: &[u8]) {
    let read = |bytes: &[u8]| {
        let disk = SimDisk::new(1);
        let path = PathBuf::from("/etc/quorate.toml");
        disk.create_dir_all(Path::new("/etc")).expect("a simulated disk takes a directory");
        disk.write_atomic(&path, bytes).expect("a simulated disk takes a file");
        config::load(&disk, &Sources { file: config::File::Named(path), ..Sources::default() })
    };
    match read(data) {
        Ok(loaded) => {
            let printed = loaded.describe();
            let again = read(printed.as_bytes()).expect("printed settings can be read");
            assert_eq!(again.config, loaded.config, "printed settings are the same");
        }
        Err(error) => assert!(!error.to_string().is_empty(), "a refusal says why"),
    }
}

/// Names, patterns, addresses, sizes and durations.
pub(super) fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(pattern) = text.parse::<PeerPattern>() {
        assert_eq!(pattern.to_string().parse::<PeerPattern>().as_ref(), Ok(&pattern));
        for slot in [0, 1, 9, 10, SLOT_MAX] {
            let address = pattern.expand(slot);
            assert_eq!(pattern.check(slot).is_ok(), host_port(&address).is_some(), "{address:?}");
            let _ = pattern.check_own(slot, text);
        }
        if let Some(headless) = pattern.headless() {
            assert!(host_port(headless).is_some());
        }
    }
    if let Ok(name) = NodeName::choose(text, None, "") {
        assert!(!name.text.is_empty());
        if let Ok(slot) = name.ordinal() {
            assert!(slot <= SLOT_MAX);
        }
    }
    if let Some((host, port)) = host_port(text) {
        assert!(!host.is_empty() && port != 0);
    }
    if let Ok(size) = text.parse::<config::Bytes>() {
        assert_eq!(size.to_string().parse::<config::Bytes>(), Ok(size), "a size survives being printed");
    }
    let _ = config::units::duration::parse(text);
    let _ = NodeName::choose("", Some(text), text);
    let _ = Path::new(text);
}

/// The bytes of a connection, however they are cut into pieces: the same comes out, never more than went in, and a valid
/// authority is left alone. The first byte says how to cut.
pub(super) fn authority(data: &[u8]) {
    let Some((cut, data)) = data.split_first() else { return };
    let mut filter = Filter::default();
    let whole = filter.pass(data).into_owned();
    assert!(whole.len() <= data.len(), "nothing is added");
    let mut filter = Filter::default();
    let pieces: Vec<u8> =
        data.chunks(usize::from(*cut).max(1)).flat_map(|piece| filter.pass(piece).into_owned()).collect();
    assert_eq!(pieces, whole, "cutting makes no difference");
    // A block has one authority; of one that has several, and is refused for that, a pass changes the first.
    let mut last = whole;
    for _ in 0..=data.len() / 2 {
        let again = Filter::default().pass(&last).into_owned();
        if again == last {
            return;
        }
        last = again;
    }
    panic!("a valid authority is not left alone");
}
