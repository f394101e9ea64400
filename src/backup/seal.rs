//! The envelope that every object of a backup is in: checksummed in pieces, and encrypted where there is a key.
//!
//! ```text
//! "QRBACKUP" | version u8 | kind u8 | key id [8] | salt [32]
//! pieces: length u32, its highest bit set in the last one | payload | tag [16]
//! ```
//! Little-endian. Kind 0, plain: the tag is the beginning of a SHA-256. Kind 1, encrypted: ChaCha20-Poly1305 under a key that HKDF-SHA256
//! makes of the key file and the salt, so that no two objects share one; the nonce is the piece's number and whether it is the last.
//! Either way a tag stands for the head, the object's name, the place of its piece, and the payload.
//!
//! Invariants: what was changed, cut, lengthened, put in another order or under another name does not open; nothing is given out of a
//! piece that does not. Memory is one piece.
//! Absent: where the bytes come from and go, and what is in them.

use std::sync::Arc;

use base64::Engine as _;
use bytes::{Buf as _, Bytes, BytesMut};
use ring::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use sha2::{Digest as _, Sha256};

const MAGIC: &[u8; 8] = b"QRBACKUP";
const VERSION: u8 = 1;
const PLAIN: u8 = 0;
const ENCRYPTED: u8 = 1;
const KEY_ID_BYTES: usize = 8;
const SALT_BYTES: usize = 32;
pub(super) const HEAD_BYTES: usize = 8 + 1 + 1 + KEY_ID_BYTES + SALT_BYTES;
const TAG_BYTES: usize = 16;
const LENGTH_BYTES: usize = 4;
const LAST: u32 = 1 << 31;
/// Payload of a piece; the last one may have less.
const PIECE_BYTES: usize = 64 << 10;

/// Why an object does not open; one sentence.
pub(super) type Damage = String;

/// What a key file holds. Cloning shares it.
#[derive(Clone)]
pub struct Key(Arc<[u8; 32]>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", hex(&self.id()))
    }
}

impl Key {
    /// Reads a key file's content: 32 bytes as 64 hexadecimal digits, or in base64.
    pub fn read(content: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(content).unwrap_or_default().trim();
        let expected = "expected 32 bytes as 64 hexadecimal digits, or in base64, as `openssl rand -hex 32` makes them";
        let from_hex = || {
            (0..text.len() / 2)
                .map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok())
                .collect::<Option<Vec<u8>>>()
        };
        let bytes = match text.len() {
            64 => from_hex(),
            _ => base64::engine::general_purpose::STANDARD.decode(text).ok(),
        };
        let key: [u8; 32] = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(expected)?;
        Ok(Self(Arc::new(key)))
    }

    /// Stands for the key in what it has sealed.
    fn id(&self) -> [u8; KEY_ID_BYTES] {
        let digest = Sha256::new_with_prefix(b"quorate backup key id").chain_update(*self.0).finalize();
        digest[..KEY_ID_BYTES].try_into().expect("a digest has 32 bytes")
    }

    fn of_object(&self, salt: &[u8]) -> LessSafeKey {
        let made = Salt::new(HKDF_SHA256, salt).extract(&*self.0);
        let made = made
            .expand(&[b"quorate backup object"], &aead::CHACHA20_POLY1305)
            .expect("one key's length is within HKDF's");
        LessSafeKey::new(UnboundKey::from(made))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes and checks the tags of one object's pieces.
struct Pieces {
    /// Head and name: in every tag.
    bound: Vec<u8>,
    key: Option<LessSafeKey>,
    next: u64,
}

impl Pieces {
    fn new(head: &[u8], name: &str, key: Option<&Key>) -> Self {
        let key = key.map(|key| key.of_object(&head[HEAD_BYTES - SALT_BYTES..]));
        Self { bound: [head, name.as_bytes()].concat(), key, next: 0 }
    }

    /// The next piece's nonce.
    fn nonce(&mut self, is_last: bool) -> [u8; aead::NONCE_LEN] {
        let mut nonce = [0; aead::NONCE_LEN];
        nonce[..8].copy_from_slice(&self.next.to_le_bytes());
        nonce[8] = u8::from(is_last);
        self.next += 1;
        nonce
    }

    fn digest(&self, nonce: &[u8], payload: &[u8]) -> [u8; TAG_BYTES] {
        let mut sha = Sha256::new();
        sha.update((self.bound.len() as u64).to_le_bytes());
        sha.update(&self.bound);
        sha.update(nonce);
        sha.update(payload);
        sha.finalize()[..TAG_BYTES].try_into().expect("a digest has 32 bytes")
    }

    fn seal(&mut self, payload: &mut [u8], is_last: bool) -> [u8; TAG_BYTES] {
        let nonce = self.nonce(is_last);
        let Some(key) = &self.key else { return self.digest(&nonce, payload) };
        let tag = key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(&self.bound[..]), payload)
            .expect("a piece is far below the cipher's bound");
        tag.as_ref().try_into().expect("the cipher's tag has 16 bytes")
    }

    /// Takes payload and tag, and leaves the payload.
    fn open(&mut self, sealed: &mut BytesMut, is_last: bool) -> Result<(), Damage> {
        let nonce = self.nonce(is_last);
        let plain = sealed.len() - TAG_BYTES;
        let holds = match &self.key {
            None => self.digest(&nonce, &sealed[..plain])[..] == sealed[plain..],
            Some(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, Aad::from(&self.bound[..]), &mut sealed[..]).is_ok()
            }
        };
        sealed.truncate(plain);
        if holds { Ok(()) } else { Err(format!("its piece {} is not what was written", self.next)) }
    }
}

/// Seals one object, as its bytes come.
pub(super) struct Sealer {
    pieces: Pieces,
    pending: BytesMut,
    out: BytesMut,
}

impl Sealer {
    /// `name` is the object's; `salt` was never used before.
    pub(super) fn new(name: &str, key: Option<&Key>, salt: [u8; 32]) -> Self {
        let mut head = MAGIC.to_vec();
        head.extend([VERSION, if key.is_some() { ENCRYPTED } else { PLAIN }]);
        head.extend(key.map_or([0; KEY_ID_BYTES], Key::id));
        head.extend(if key.is_some() { salt } else { [0; SALT_BYTES] });
        let out = BytesMut::from(&head[..]);
        Self { pieces: Pieces::new(&head, name, key), pending: BytesMut::new(), out }
    }

    pub(super) fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // A full piece is sealed only when more follows: the last one is marked.
            if self.pending.len() == PIECE_BYTES {
                self.seal(false);
            }
            let (now, later) = bytes.split_at(bytes.len().min(PIECE_BYTES - self.pending.len()));
            self.pending.extend_from_slice(now);
            bytes = later;
        }
    }

    fn seal(&mut self, is_last: bool) {
        let tag = self.pieces.seal(&mut self.pending, is_last);
        let length = self.pending.len() as u32 | if is_last { LAST } else { 0 };
        self.out.extend_from_slice(&length.to_le_bytes());
        self.out.extend_from_slice(&self.pending);
        self.out.extend_from_slice(&tag);
        self.pending.clear();
    }

    /// What is sealed so far, and was not taken.
    pub(super) fn take(&mut self) -> Bytes {
        self.out.split().freeze()
    }

    /// The rest.
    pub(super) fn end(mut self) -> Bytes {
        self.seal(true);
        self.take()
    }
}

/// Seals a whole object.
pub(super) fn seal(name: &str, key: Option<&Key>, salt: [u8; 32], bytes: &[u8]) -> Bytes {
    let mut sealer = Sealer::new(name, key, salt);
    sealer.push(bytes);
    sealer.end()
}

/// Opens one object, as its bytes come.
pub(super) struct Opener {
    name: String,
    key: Option<Key>,
    pieces: Option<Pieces>,
    pending: BytesMut,
    is_ended: bool,
}

impl Opener {
    pub(super) fn new(name: &str, key: Option<&Key>) -> Self {
        Self { name: name.to_owned(), key: key.cloned(), pieces: None, pending: BytesMut::new(), is_ended: false }
    }

    /// Takes what comes next; gives what of it is whole.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Bytes>, Damage> {
        self.pending.extend_from_slice(bytes);
        let mut opened = Vec::new();
        if self.pieces.is_none() {
            if self.pending.len() < HEAD_BYTES {
                return Ok(opened);
            }
            self.pieces = Some(self.head()?);
        }
        let pieces = self.pieces.as_mut().expect("the head was read");
        while self.pending.len() >= LENGTH_BYTES {
            if self.is_ended {
                return Err("something follows its end".into());
            }
            let length = u32::from_le_bytes(self.pending[..LENGTH_BYTES].try_into().expect("four bytes"));
            let (is_last, payload) = (length & LAST != 0, (length & !LAST) as usize);
            if payload > PIECE_BYTES {
                return Err(format!("a piece of {payload} bytes, where {PIECE_BYTES} are the most"));
            }
            if self.pending.len() < LENGTH_BYTES + payload + TAG_BYTES {
                break;
            }
            self.pending.advance(LENGTH_BYTES);
            let mut sealed = self.pending.split_to(payload + TAG_BYTES);
            pieces.open(&mut sealed, is_last)?;
            self.is_ended = is_last;
            opened.push(sealed.freeze());
        }
        Ok(opened)
    }

    fn head(&mut self) -> Result<Pieces, Damage> {
        let head = self.pending.split_to(HEAD_BYTES);
        if &head[..8] != MAGIC {
            return Err("it is no object of a backup".into());
        }
        if head[8] != VERSION {
            return Err(format!(
                "its envelope has version {}, and this build knows {VERSION}: use a newer one",
                head[8]
            ));
        }
        let id = &head[10..10 + KEY_ID_BYTES];
        let key = match (head[9], &self.key) {
            (PLAIN, None) => None,
            (PLAIN, Some(_)) => {
                return Err(
                    "it is not encrypted, and a key file was given: leave that out, or name another path".into()
                );
            }
            (ENCRYPTED, None) => return Err(format!("it is encrypted with the key {}: give that key's file", hex(id))),
            (ENCRYPTED, Some(key)) if key.id() != id => {
                return Err(format!(
                    "it is encrypted with the key {}, and the key file given is {}",
                    hex(id),
                    hex(&key.id())
                ));
            }
            (ENCRYPTED, Some(key)) => Some(key),
            (kind, _) => return Err(format!("its envelope is of kind {kind}, which is unknown")),
        };
        Ok(Pieces::new(&head, &self.name, key))
    }

    /// After the last byte.
    pub(super) fn end(self) -> Result<(), Damage> {
        if self.is_ended && self.pending.is_empty() { Ok(()) } else { Err("it is cut".into()) }
    }
}

/// Opens a whole object.
pub(super) fn open(name: &str, key: Option<&Key>, sealed: &[u8]) -> Result<Bytes, Damage> {
    let mut opener = Opener::new(name, key);
    let opened = opener.push(sealed)?;
    opener.end()?;
    Ok(opened.concat().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> Key {
        Key::read(hex(&[byte; 32]).as_bytes()).unwrap()
    }

    #[test]
    fn what_was_sealed_opens_under_its_name_and_key_alone() {
        for key in [None, Some(key(7))] {
            for bytes in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES] {
                let content: Vec<u8> = (0..bytes).map(|i| i as u8).collect();
                let sealed = seal("a/1", key.as_ref(), [3; 32], &content);
                assert_eq!(open("a/1", key.as_ref(), &sealed).unwrap(), content, "{bytes}");
                assert!(open("a/2", key.as_ref(), &sealed).is_err(), "under another name");
                // However it is cut on its way.
                let mut opener = Opener::new("a/1", key.as_ref());
                let pieces: Vec<Bytes> = sealed.chunks(997).flat_map(|part| opener.push(part).unwrap()).collect();
                opener.end().unwrap();
                assert_eq!(pieces.concat(), content);
            }
        }
        let sealed = seal("a", Some(&key(7)), [3; 32], b"secret");
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        assert!(open("a", None, &sealed).unwrap_err().contains("encrypted"));
        assert!(open("a", Some(&key(8)), &sealed).unwrap_err().contains("the key file given"));
        assert!(open("a", Some(&key(7)), &seal("a", None, [0; 32], b"x")).unwrap_err().contains("not encrypted"));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_shows() {
        for key in [None, Some(key(1))] {
            let sealed = seal("name", key.as_ref(), [9; 32], b"some content");
            for at in 0..sealed.len() {
                for bit in 0..8 {
                    let mut bad = sealed.to_vec();
                    bad[at] ^= 1 << bit;
                    assert!(open("name", key.as_ref(), &bad).is_err(), "bit {bit} of byte {at}");
                }
                assert!(open("name", key.as_ref(), &sealed[..at]).is_err(), "cut at {at}");
            }
            assert!(open("name", key.as_ref(), &[&sealed[..], b"x"].concat()).is_err());
        }
    }

    #[test]
    fn pieces_in_another_order_or_of_another_object_do_not_open() {
        let content = vec![5; 3 * PIECE_BYTES];
        let whole = PIECE_BYTES + LENGTH_BYTES + TAG_BYTES;
        for key in [None, Some(key(1))] {
            let (one, other) = (seal("a", key.as_ref(), [1; 32], &content), seal("b", key.as_ref(), [2; 32], &content));
            let (first, second) = (HEAD_BYTES..HEAD_BYTES + whole, HEAD_BYTES + whole..HEAD_BYTES + 2 * whole);
            let mut swapped = one.to_vec();
            swapped[first.clone()].copy_from_slice(&one[second.clone()]);
            swapped[second.clone()].copy_from_slice(&one[first]);
            assert!(open("a", key.as_ref(), &swapped).is_err());
            let mut foreign = one.to_vec();
            foreign[second.clone()].copy_from_slice(&other[second.clone()]);
            assert!(open("a", key.as_ref(), &foreign).is_err());
            let without = [&one[..second.start], &one[second.end..]].concat();
            assert!(open("a", key.as_ref(), &without).is_err());
        }
    }

    #[test]
    fn a_key_file_holds_32_bytes() {
        let text = hex(&[0xab; 32]);
        assert!(Key::read(format!("{text}\n").as_bytes()).is_ok());
        let base = base64::engine::general_purpose::STANDARD.encode([0xab; 32]);
        assert_eq!(Key::read(base.as_bytes()).unwrap().id(), key(0xab).id());
        for bad in [&b""[..], b"secret", &text.as_bytes()[..62], &[0xff; 32]] {
            assert!(Key::read(bad).unwrap_err().contains("openssl rand -hex 32"));
        }
    }
}
