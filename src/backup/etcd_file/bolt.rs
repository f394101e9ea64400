//! A reader of bbolt files, the B+ trees in one file that etcd keeps its data in.
//!
//! Owns which pages make the file: the newer of two meta pages, the buckets, and each bucket's tree from its root.
//! Invariants: a page is read when the way comes to it and let go when the way has left it, so memory is a page for each level of one tree;
//! a bucket gives a page at most once, so no loop is followed and no more is read than the file has; keys ascend. What breaks any of that is
//! damage, and after it nothing is given.
//! Absent: writing, the list of free pages, looking keys up, buckets in buckets below the first: etcd's files need none of it.

use std::sync::Arc;

use bytes::Bytes;

use super::Error;
use super::page::{self, Element, HEAD_BYTES, META_BYTES, Meta, PAGE_BYTES_MAX, PAGE_BYTES_MIN, Page};
use crate::env::File;

/// A page is larger than others only if one value of it is; far above the largest request.
const READ_BYTES_MAX: u64 = 64 << 20;
/// Two elements a page would already make a tree of more pages than a file can have.
const DEPTH_MAX: usize = 64;

/// A file whose meta pages were read.
pub struct Bolt {
    pages: Pages,
    buckets: Vec<(Bytes, Root)>,
}

/// Where a bucket's tree begins.
#[derive(Clone)]
enum Root {
    At(u64),
    Inline(Page),
}

impl Bolt {
    /// Whether a file is one of bbolt, whole or not.
    pub fn is_one(file: &dyn File) -> bool {
        let len = file.len().unwrap_or(0);
        let mut head = [0; HEAD_BYTES + 4];
        std::iter::once(0).chain(page_sizes()).any(|at| {
            at + (head.len() as u64) <= len && file.read_exact_at(&mut head, at).is_ok() && Meta::has_magic(&head)
        })
    }

    /// Opens the first `len` bytes of `file`.
    pub fn open(file: Arc<dyn File>, len: u64, name: &str) -> Result<Self, Error> {
        let mut pages = Pages { file, name: name.to_owned(), page_bytes: 0, count: 0 };
        let meta = pages.newest_meta(len)?;
        if meta.pages.checked_mul(meta.page_bytes).is_none_or(|bytes| bytes > len) {
            let has = len / meta.page_bytes;
            return Err(pages.damaged(format!("it is cut: it has {has} pages, expected {}", meta.pages)));
        }
        (pages.page_bytes, pages.count) = (meta.page_bytes, meta.pages);
        let mut buckets = Vec::new();
        for element in Elements::new(&pages, Root::At(meta.root))? {
            let element = element?;
            if !element.is_bucket {
                return Err(pages.damaged("it has a key beside its buckets"));
            }
            let root = page::bucket(&element.value).map_err(|reason| pages.damaged(reason))?;
            let root = root.1.map_or(Root::At(root.0), Root::Inline);
            buckets.push((Bytes::copy_from_slice(&element.key), root));
        }
        Ok(Self { pages, buckets })
    }

    /// What a bucket holds, in the order of its keys; nothing if there is no such bucket.
    pub fn bucket(&self, name: &str) -> Result<impl Iterator<Item = Result<(Bytes, Bytes), Error>>, Error> {
        let found = self.buckets.iter().find(|(bucket, _)| bucket == name.as_bytes());
        let elements = match found {
            Some((_, root)) => Some(Elements::new(&self.pages, root.clone())?),
            None => None,
        };
        Ok(elements.into_iter().flatten().map(|element| {
            let Element { is_bucket, key, value } = element?;
            if is_bucket { Err(self.pages.damaged("a bucket in a bucket")) } else { Ok((key, value)) }
        }))
    }

    /// Whether there is such a bucket, with or without content.
    pub fn has_bucket(&self, name: &str) -> bool {
        self.buckets.iter().any(|(bucket, _)| bucket == name.as_bytes())
    }
}

/// The sizes that pages may have.
fn page_sizes() -> impl Iterator<Item = u64> {
    std::iter::successors(Some(PAGE_BYTES_MIN), |size| Some(size * 2).filter(|size| *size <= PAGE_BYTES_MAX))
}

struct Pages {
    file: Arc<dyn File>,
    name: String,
    page_bytes: u64,
    /// Pages of the file; what lies behind them is none of it.
    count: u64,
}

impl Pages {
    fn newest_meta(&self, len: u64) -> Result<Meta, Error> {
        let at = |at: u64| -> Result<Option<Meta>, Error> {
            let mut head = [0; HEAD_BYTES + META_BYTES];
            if at + head.len() as u64 > len {
                return Ok(None);
            }
            self.file.read_exact_at(&mut head, at)?;
            if head[HEAD_BYTES..HEAD_BYTES + 4] == page::MAGIC.to_be_bytes() {
                return Err(self.damaged("it was written by a big-endian machine, which cannot be read here"));
            }
            Ok(Meta::parse(&head).filter(|meta| at == 0 || at == meta.page_bytes))
        };
        // The first says where the second is. Nowhere else is looked then: in the middle of the file may be a value that looks like one.
        if let Some(first) = at(0)? {
            let second = at(first.page_bytes)?.filter(|second| second.txid > first.txid);
            return Ok(second.unwrap_or(first));
        }
        for size in page_sizes() {
            if let Some(second) = at(size)? {
                return Ok(second);
            }
        }
        Err(self.damaged("neither of its two meta pages is whole"))
    }

    fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Damaged { name: self.name.clone(), reason: reason.into() }
    }

    /// The page `id`, with all that it goes on over; `seen` has those that the way has been at.
    fn read(&self, id: u64, seen: &mut Seen) -> Result<Page, Error> {
        let beyond = || self.damaged(format!("page {id} is asked for, and {} pages are there", self.count));
        if id >= self.count {
            return Err(beyond());
        }
        let mut bytes = vec![0; self.page_bytes as usize];
        // Within the file: that was checked for all pages when it was opened.
        self.file.read_exact_at(&mut bytes, id * self.page_bytes)?;
        let pages = 1 + page::overflow(&bytes);
        if pages > self.count - id {
            return Err(beyond());
        }
        if pages * self.page_bytes > READ_BYTES_MAX {
            return Err(self.damaged(format!("page {id} goes on over {pages} pages, more than a value can take")));
        }
        if !seen.add(id, pages) {
            return Err(self.damaged(format!("page {id} belongs to more than one place of a tree")));
        }
        if pages > 1 {
            bytes.resize((pages * self.page_bytes) as usize, 0);
            self.file.read_exact_at(&mut bytes[self.page_bytes as usize..], (id + 1) * self.page_bytes)?;
        }
        Page::parse(bytes.into(), Some(id)).map_err(|reason| self.damaged(reason))
    }
}

/// Pages that the way has been at: a bit each.
struct Seen(Vec<u64>);

impl Seen {
    fn new(count: u64) -> Self {
        Self(vec![0; count.div_ceil(64) as usize])
    }

    /// False if one of them was added before.
    fn add(&mut self, id: u64, pages: u64) -> bool {
        (id..id + pages).all(|id| {
            let (word, bit) = (&mut self.0[(id / 64) as usize], 1 << (id % 64));
            let is_new = *word & bit == 0;
            *word |= bit;
            is_new
        })
    }
}

/// The leaves' elements below a root, in order; an error is the last.
struct Elements<'a> {
    pages: &'a Pages,
    /// From the root down: a page, and how many of its elements were taken.
    way: Vec<(Page, usize)>,
    seen: Seen,
    last: Bytes,
}

impl<'a> Elements<'a> {
    fn new(pages: &'a Pages, root: Root) -> Result<Self, Error> {
        let (page, seen) = match root {
            Root::Inline(page) => (page, Seen::new(0)),
            Root::At(id) => {
                let mut seen = Seen::new(pages.count);
                (pages.read(id, &mut seen)?, seen)
            }
        };
        Ok(Self { pages, way: vec![(page, 0)], seen, last: Bytes::new() })
    }

    fn step(&mut self) -> Result<Option<Element>, Error> {
        while let Some((page, taken)) = self.way.last_mut() {
            let nth = *taken;
            *taken += 1;
            if nth == page.count() {
                self.way.pop();
            } else if page.is_leaf() {
                let element = page.element(nth).map_err(|reason| self.pages.damaged(reason))?;
                // No key is empty, so the first is above none.
                if element.key <= self.last {
                    return Err(self.pages.damaged("keys of a bucket are out of order"));
                }
                self.last = element.key.clone();
                return Ok(Some(element));
            } else {
                let child = page.child(nth);
                if self.way.len() == DEPTH_MAX {
                    return Err(self.pages.damaged(format!("a tree of more than {DEPTH_MAX} levels")));
                }
                let page = self.pages.read(child, &mut self.seen)?;
                self.way.push((page, 0));
            }
        }
        Ok(None)
    }
}

impl Iterator for Elements<'_> {
    type Item = Result<Element, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.step();
        if next.is_err() {
            self.way.clear();
        }
        next.transpose()
    }
}
