//! The pages of a bbolt file, as bytes: what a page is, and what it holds.
//!
//! ```text
//! page:   id u64 | flags u16 | count u16 | overflow u32 | elements | keys and values
//! branch: count times: offset u32 | key bytes u32 | child page u64
//! leaf:   count times: flags u32 | offset u32 | key bytes u32 | value bytes u32
//! meta:   magic u32 | version u32 | page bytes u32 | flags u32 | root page u64 | sequence u64 | freelist u64 | pages u64 | txid u64 | FNV-1a u64
//! ```
//! Little-endian, as the machines write it that etcd is released for. An offset counts from the element that has it. A page goes on over as
//! many pages as `overflow` says.
//! Invariants: no offset is believed before it was checked, and no bytes make this panic.
//! Absent: where pages are read from, and which belong together (`bolt`).

use bytes::Bytes;

pub(super) const HEAD_BYTES: usize = 16;
pub(super) const META_BYTES: usize = 64;
const ELEMENT_BYTES: usize = 16;
pub(super) const MAGIC: u32 = 0xed0c_daed;
const VERSION: u32 = 2;

const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const META: u16 = 0x04;
/// Of a leaf's element: its value is a bucket.
const BUCKET: u32 = 0x01;

/// bbolt's own bounds: it looks for a second meta page at these sizes.
pub(super) const PAGE_BYTES_MIN: u64 = 1 << 10;
pub(super) const PAGE_BYTES_MAX: u64 = 16 << 20;

/// What the first page and the second say of the file; the one of the later transaction counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub page_bytes: u64,
    /// The page of the bucket that holds the buckets.
    pub root: u64,
    /// Pages that were ever in use: those of a sound file are below it.
    pub pages: u64,
    pub txid: u64,
}

impl Meta {
    /// Of the first bytes of a page; `None` if it is no meta page, or a torn one.
    pub(super) fn parse(page: &[u8]) -> Option<Self> {
        let meta = page.get(HEAD_BYTES..HEAD_BYTES + META_BYTES)?;
        let (content, checksum) = meta.split_at(META_BYTES - 8);
        let is_meta = u16_at(page, 8) == META && u32_at(meta, 0) == MAGIC && u32_at(meta, 4) == VERSION;
        let page_bytes = u64::from(u32_at(meta, 8));
        let is_size = page_bytes.is_power_of_two() && (PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&page_bytes);
        if !is_meta || !is_size || fnv_1a(content) != u64_at(checksum, 0) {
            return None;
        }
        Some(Self { page_bytes, root: u64_at(meta, 16), pages: u64_at(meta, 40), txid: u64_at(meta, 48) })
    }

    /// Whether these first bytes of a page have the mark of a meta page, whole or not, in either order of bytes.
    pub(super) fn has_magic(page: &[u8]) -> bool {
        page.len() >= HEAD_BYTES + 4 && [MAGIC, MAGIC.swap_bytes()].contains(&u32_at(page, HEAD_BYTES))
    }
}

/// FNV-1a of 64 bits.
fn fnv_1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// How many pages a page goes on over, as its first bytes say it.
pub(super) fn overflow(head: &[u8]) -> u64 {
    u64::from(u32_at(head, 12))
}

/// A branch, or a leaf.
#[derive(Clone, Debug)]
pub(super) struct Page {
    bytes: Bytes,
    is_leaf: bool,
    count: usize,
}

/// One element of a leaf. Its bytes are the page's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub is_bucket: bool,
    pub key: Bytes,
    pub value: Bytes,
}

impl Page {
    /// `bytes` are the page's with all that it goes on over. `id` is `None` for a page inside of a value, which has none.
    pub(super) fn parse(bytes: Bytes, id: Option<u64>) -> Result<Self, String> {
        if bytes.len() < HEAD_BYTES {
            return Err("a page without a head".to_owned());
        }
        let says = u64_at(&bytes, 0);
        if let Some(id) = id.filter(|id| *id != says) {
            return Err(format!("page {id} says that it is page {says}"));
        }
        let flags = u16_at(&bytes, 8);
        let is_leaf = match flags {
            LEAF => true,
            BRANCH => false,
            _ => return Err(format!("page {says} is neither branch nor leaf: its flags are {flags:#x}")),
        };
        let count = usize::from(u16_at(&bytes, 10));
        if HEAD_BYTES + count * ELEMENT_BYTES > bytes.len() {
            return Err(format!("page {says} has {count} elements, more than fit into it"));
        }
        Ok(Self { bytes, is_leaf, count })
    }

    pub(super) fn is_leaf(&self) -> bool {
        self.is_leaf
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The page that the branch's element leads to.
    pub(super) fn child(&self, nth: usize) -> u64 {
        u64_at(&self.bytes, HEAD_BYTES + nth * ELEMENT_BYTES + 8)
    }

    /// The leaf's element.
    pub(super) fn element(&self, nth: usize) -> Result<Element, String> {
        let at = HEAD_BYTES + nth * ELEMENT_BYTES;
        let field = |nth: usize| u32_at(&self.bytes, at + 4 * nth) as usize;
        // All of them have 32 bits, and are added with 64.
        let key = at + field(1);
        let value = key + field(2);
        let end = value + field(3);
        if end > self.bytes.len() || value == key {
            return Err(format!("element {nth} of a leaf has no key, or goes beyond its page"));
        }
        Ok(Element {
            is_bucket: field(0) as u32 & BUCKET != 0,
            key: self.bytes.slice(key..value),
            value: self.bytes.slice(value..end),
        })
    }
}

/// A bucket as the value of an element: its root page, or that page itself behind the head if it is small.
pub(super) fn bucket(value: &Bytes) -> Result<(u64, Option<Page>), String> {
    if value.len() < 16 {
        return Err("a bucket without a head".to_owned());
    }
    match u64_at(value, 0) {
        0 => {
            let page = Page::parse(value.slice(16..), None)?;
            if page.is_leaf() { Ok((0, Some(page))) } else { Err("a bucket that is small and has branches".to_owned()) }
        }
        root => Ok((root, None)),
    }
}

/// Numbers at a place that was checked; beyond the end they are 0.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_fnv_1a() {
        // Of the reference: https://www.rfc-editor.org/rfc/rfc9923, "foobar".
        assert_eq!(fnv_1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv_1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    /// A leaf with one element, of which one field is `value`.
    fn leaf(field: usize, value: u32) -> Page {
        let mut bytes = vec![0; 64];
        bytes[8] = LEAF as u8;
        bytes[10] = 1;
        for (nth, number) in [(0, 0), (1, 16u32), (2, 3), (3, 4)] {
            let number = if nth == field { value } else { number };
            bytes[16 + 4 * nth..20 + 4 * nth].copy_from_slice(&number.to_le_bytes());
        }
        bytes[32..39].copy_from_slice(b"keyword");
        Page::parse(bytes.into(), Some(0)).unwrap()
    }

    #[test]
    fn offsets_that_lead_out_of_the_page_are_refused() {
        let element = leaf(9, 0).element(0).unwrap();
        assert_eq!((&element.key[..], &element.value[..], element.is_bucket), (&b"key"[..], &b"word"[..], false));
        for (field, value) in [(1, 42), (1, u32::MAX), (2, 0), (2, 45), (2, u32::MAX), (3, 30), (3, u32::MAX)] {
            assert!(leaf(field, value).element(0).is_err(), "field {field} is {value}");
        }
        let mut bytes = vec![0; 47];
        (bytes[8], bytes[10]) = (LEAF as u8, 2);
        assert!(Page::parse(bytes.clone().into(), None).is_err(), "two elements do not fit");
        bytes.push(0);
        assert!(Page::parse(bytes.clone().into(), None).is_ok());
        assert!(Page::parse(bytes.clone().into(), Some(1)).is_err(), "it is another page");
        bytes[8] = 0x10;
        assert!(Page::parse(bytes.into(), None).is_err(), "a list of free pages");
        assert!(bucket(&Bytes::from_static(&[0; 15])).is_err() && bucket(&Bytes::from_static(&[0; 16])).is_err());
    }
}
