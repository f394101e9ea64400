//! Where backups are: a directory, or a path in an object store, as a flat set of sealed objects.
//!
//! Owns every name of the crate `object_store`. Objects are made once and never written over: `Store::create` lets only one of several
//! writers make a name, which is all the agreement that writers have and need. A store that does not keep to that is refused
//! (`Store::check`).
//! Invariant: whatever is given out was opened from its envelope under its own name (`seal`). Memory is an object of changes, or two
//! parts of a full backup. Every call ends: by an answer, or by time.
//! Absent: what the objects mean (`archive`).

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt as _;
use futures_util::stream::BoxStream;
use object_store::RetryConfig;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions};
use sha2::{Digest as _, Sha256};

use super::http::Connector;
use super::seal::{self, Key, Opener, Sealer};
use super::{Error, Result};
use crate::config;
use crate::env::{Env, OpenMode, WallTime, timeout};

/// Parts of a full backup: stores take none below 5 MiB, but for the last.
const PART_BYTES: usize = 5 << 20;
/// Objects of changes have 2 MiB and an entry at most (`archive`).
const OBJECT_BYTES_MAX: u64 = 64 << 20;
/// A call takes no longer, its own retries included.
const PATIENCE: Duration = Duration::from_secs(120);
const RETRIES: usize = 3;
const RETRY_FOR: Duration = Duration::from_secs(20);

/// How a store is reached, beside its URL and the environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`).
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// URL of an S3 server that is not Amazon's.
    pub endpoint: String,
    /// CAs in PEM that the store's certificate must come from; none: those that the system trusts.
    pub ca_file: Option<PathBuf>,
    /// Encrypts, and opens what is encrypted.
    pub key_file: Option<PathBuf>,
}

impl Access {
    /// As a member's settings have it.
    pub fn of(settings: &config::Backup) -> Self {
        let named = |path: &PathBuf| Some(path.clone()).filter(|path| !path.as_os_str().is_empty());
        Self {
            endpoint: settings.endpoint.clone(),
            ca_file: named(&settings.ca_file),
            key_file: named(&settings.key_file),
        }
    }
}

/// An object that is there.
#[derive(Clone, Debug)]
pub struct Found {
    /// Below the path.
    pub name: String,
    pub bytes: u64,
    /// By the store's clock.
    pub modified: WallTime,
}

/// One path. Cloning shares it.
#[derive(Clone)]
pub struct Store {
    env: Env,
    objects: Arc<dyn ObjectStore>,
    root: Path,
    url: String,
    key: Option<Key>,
}

impl Store {
    /// `url`: a directory, or `file:///directory`, `s3://bucket/path`, `gs://bucket/path`, `az://container/path`. Nothing is asked yet.
    pub fn open(env: &Env, url: &str, access: &Access) -> Result<Self> {
        let read = |path: &PathBuf| {
            let bytes = env.disk.open(path, OpenMode::Read).and_then(|_| env.disk.read(path));
            bytes.map_err(|error| Error::Refused(format!("{}: {error}", path.display())))
        };
        let key = match &access.key_file {
            Some(file) => {
                Some(Key::read(&read(file)?).map_err(|error| Error::Refused(format!("{}: {error}", file.display())))?)
            }
            None => None,
        };
        let ca = access.ca_file.as_ref().map(read).transpose()?.unwrap_or_default();
        let connector = Connector::new(env.clone(), ca);
        let (objects, root) = objects(url, &access.endpoint, connector)
            .map_err(|error| Error::Refused(format!("backup path {url:?}: {error}")))?;
        Ok(Self { env: env.clone(), objects, root, url: url.to_owned(), key })
    }

    /// For tests: a path in this store.
    #[cfg(test)]
    pub(super) fn of(env: &Env, objects: Arc<dyn ObjectStore>, key: Option<Key>) -> Self {
        Self { env: env.clone(), objects, root: Path::from("backups"), url: "test".into(), key }
    }

    /// As it was given.
    pub fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn env(&self) -> &Env {
        &self.env
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.root.clone(), |path, part| path.join(part))
    }

    async fn call<T>(&self, what: &str, call: impl Future<Output = object_store::Result<T>>) -> Result<T> {
        let what = || format!("{}: {what}", self.url);
        match timeout(PATIENCE, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => Err(Error::Store { what: what(), source: Box::new(source) }),
            Err(_) => Err(Error::Late { what: what(), patience: PATIENCE }),
        }
    }

    fn seal(&self, name: &str, bytes: &[u8]) -> Bytes {
        seal::seal(name, self.key.as_ref(), self.env.secret(), bytes)
    }

    /// Makes an object, if there is none of that name: of several writers one does. Gives the SHA-256 of what was made.
    pub(super) async fn create(&self, name: &str, bytes: &[u8]) -> Result<Option<[u8; 32]>> {
        let sealed = self.seal(name, bytes);
        let sha = Sha256::digest(&sealed).into();
        let options = PutOptions::from(PutMode::Create);
        let path = self.path(name);
        let put = self.objects.put_opts(&path, sealed.into(), options);
        match self.call(&format!("writing {name}"), put).await {
            Ok(_) => Ok(Some(sha)),
            Err(Error::Store { source, .. }) if matches!(*source, object_store::Error::AlreadyExists { .. }) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// An object's content, and the SHA-256 of the object.
    pub(super) async fn read(&self, name: &str) -> Result<Option<(Bytes, [u8; 32])>> {
        let what = format!("reading {name}");
        let got = match self.call(&what, self.objects.get(&self.path(name))).await {
            Ok(got) => got,
            Err(Error::Store { source, .. }) if matches!(*source, object_store::Error::NotFound { .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if got.meta.size > OBJECT_BYTES_MAX {
            return Err(self.damaged(name, format!("it has {} bytes, more than any such object", got.meta.size)));
        }
        let sealed = self.call(&what, got.bytes()).await?;
        let content = seal::open(name, self.key.as_ref(), &sealed).map_err(|reason| self.damaged(name, reason))?;
        Ok(Some((content, Sha256::digest(&sealed).into())))
    }

    pub(super) fn damaged(&self, name: &str, reason: impl ToString) -> Error {
        Error::Damaged { name: format!("{}/{name}", self.url.trim_end_matches('/')), reason: reason.to_string() }
    }

    /// Begins a large object.
    pub(super) async fn upload(&self, name: &str) -> Result<Upload> {
        let upload = self.call(&format!("writing {name}"), self.objects.put_multipart(&self.path(name))).await?;
        let sealer = Sealer::new(name, self.key.as_ref(), self.env.secret());
        Ok(Upload {
            store: self.clone(),
            name: name.to_owned(),
            upload,
            sealer,
            part: BytesMut::new(),
            bytes: 0,
            sha: Sha256::new(),
        })
    }

    /// Reads a large object, a piece at a time.
    pub(super) async fn download(&self, name: &str) -> Result<Download> {
        let got = match self.call(&format!("reading {name}"), self.objects.get(&self.path(name))).await {
            Err(Error::Store { source, .. }) if matches!(*source, object_store::Error::NotFound { .. }) => {
                return Err(self.damaged(name, "it is missing"));
            }
            got => got?,
        };
        let opener = Some(Opener::new(name, self.key.as_ref()));
        let (name, sealed) = (name.to_owned(), got.into_stream());
        Ok(Download {
            store: self.clone(),
            name,
            sealed,
            opener,
            opened: Vec::new().into_iter(),
            sha: Sha256::new(),
            bytes: 0,
        })
    }

    /// The objects below `directory`, by name; with `after`, those whose names come after that one.
    pub(super) async fn list(&self, directory: &str, after: Option<&str>) -> Result<Vec<Found>> {
        let below = self.path(directory);
        let found = match after {
            Some(after) => self.objects.list_with_offset(Some(&below), &self.path(after)),
            None => self.objects.list(Some(&below)),
        };
        let all: Vec<object_store::ObjectMeta> =
            self.call(&format!("listing {directory}"), found.try_collect()).await?;
        let skipped = self.root.as_ref().len() + usize::from(!self.root.as_ref().is_empty());
        let mut all: Vec<Found> = all
            .into_iter()
            .map(|meta| Found {
                name: meta.location.as_ref()[skipped..].to_owned(),
                bytes: meta.size,
                modified: meta.last_modified.into(),
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Removes an object; one that is gone already is no error.
    pub(super) async fn remove(&self, name: &str) -> Result<()> {
        match self.call(&format!("removing {name}"), self.objects.delete(&self.path(name))).await {
            Err(Error::Store { source, .. }) if matches!(*source, object_store::Error::NotFound { .. }) => Ok(()),
            done => done,
        }
    }

    /// Refuses a store that lets two writers make the same object.
    pub async fn check(&self) -> Result<()> {
        let name = format!("check/{:016x}", self.env.random_u64());
        let (first, second) = (self.create(&name, b"1").await?, self.create(&name, b"2").await?);
        let kept = self.read(&name).await?;
        self.remove(&name).await?;
        if first.is_some() && second.is_none() && kept.is_some_and(|(kept, _)| *kept == *b"1") {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "{}: this store writes over an object that it was told to make only if there is none (If-None-Match), so two clusters could \
             destroy each other's backups: use one that keeps to it (Amazon S3, Google Cloud Storage, Azure, MinIO, Ceph, a directory)",
            self.url
        )))
    }
}

/// The objects behind a URL, and the path among them.
fn objects(
    url: &str,
    endpoint: &str,
    connector: Connector,
) -> std::result::Result<(Arc<dyn ObjectStore>, Path), Box<dyn std::error::Error>> {
    let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_FOR, ..RetryConfig::default() };
    let Some((scheme, rest)) = url.split_once("://") else {
        if url.is_empty() {
            return Err("expected a directory or s3://bucket/path".into());
        }
        return Ok((Arc::new(LocalFileSystem::new().with_fsync(true)), directory(url)?));
    };
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    let root = Path::parse(path.trim_matches('/'))?;
    if bucket.is_empty() && scheme != "file" {
        return Err("expected the name of a bucket after ://".into());
    }
    Ok(match scheme {
        "file" if bucket.is_empty() => {
            (Arc::new(LocalFileSystem::new().with_fsync(true)), directory(&format!("/{path}"))?)
        }
        "s3" => {
            let mut builder =
                AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry).with_http_connector(connector);
            if !endpoint.is_empty() {
                builder = builder.with_endpoint(endpoint).with_allow_http(endpoint.starts_with("http://"));
            }
            (Arc::new(builder.build()?), root)
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retry);
            (Arc::new(builder.with_http_connector(connector).build()?), root)
        }
        "az" => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(retry);
            if !endpoint.is_empty() {
                builder = builder.with_endpoint(endpoint.to_owned()).with_allow_http(endpoint.starts_with("http://"));
            }
            (Arc::new(builder.with_http_connector(connector).build()?), root)
        }
        _ => return Err("expected a directory, or a URL that begins with file:///, s3://, gs:// or az://".into()),
    })
}

fn directory(path: &str) -> std::result::Result<Path, Box<dyn std::error::Error>> {
    Ok(Path::from_absolute_path(std::path::absolute(FilePath::new(path))?)?)
}

/// A large object that is being written. Dropped before its end, it leaves nothing that has a name.
pub(super) struct Upload {
    store: Store,
    name: String,
    upload: Box<dyn MultipartUpload>,
    sealer: Sealer,
    part: BytesMut,
    bytes: u64,
    sha: Sha256,
}

/// What was written.
pub(super) struct Uploaded {
    pub sealed_bytes: u64,
    /// Of the object.
    pub sealed_sha256: [u8; 32],
}

impl Upload {
    /// Seals and sends; returns when all but what is less than a part has arrived.
    pub(super) async fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.sealer.push(bytes);
        let sealed = self.sealer.take();
        self.hold(&sealed);
        while self.part.len() >= PART_BYTES {
            // All of one size, as some stores want it.
            let part = self.part.split_to(PART_BYTES).freeze();
            self.send(part).await?;
        }
        Ok(())
    }

    fn hold(&mut self, sealed: &[u8]) {
        self.sha.update(sealed);
        self.bytes += sealed.len() as u64;
        self.part.extend_from_slice(sealed);
    }

    async fn send(&mut self, part: Bytes) -> Result<()> {
        let part = self.upload.put_part(part.into());
        self.store.call(&format!("writing {}", self.name), part).await
    }

    /// The object is there when this returns.
    pub(super) async fn finish(mut self) -> Result<Uploaded> {
        let sealer = std::mem::replace(&mut self.sealer, Sealer::new("", None, [0; 32]));
        self.hold(&sealer.end());
        let rest = self.part.split().freeze();
        self.send(rest).await?;
        self.store.call(&format!("writing {}", self.name), self.upload.complete()).await?;
        Ok(Uploaded { sealed_bytes: self.bytes, sealed_sha256: self.sha.finalize().into() })
    }

    /// Takes back what has arrived, as far as the store answers.
    pub(super) async fn abort(mut self) {
        if let Err(error) = self.store.call("taking an upload back", self.upload.abort()).await {
            tracing::debug!(%error, "what was sent of a full backup stays until the store removes it");
        }
    }
}

/// A large object that is being read.
pub(super) struct Download {
    store: Store,
    name: String,
    sealed: BoxStream<'static, object_store::Result<Bytes>>,
    opener: Option<Opener>,
    opened: std::vec::IntoIter<Bytes>,
    sha: Sha256,
    bytes: u64,
}

impl Download {
    /// The next piece of the content; `None` after a whole object. Pieces are as good as they ever are: each was checked.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(piece) = self.opened.next() {
                return Ok(Some(piece));
            }
            let Some(opener) = &mut self.opener else { return Ok(None) };
            let next = self.store.call(&format!("reading {}", self.name), self.sealed.try_next()).await?;
            let opened = match next {
                Some(bytes) => {
                    self.sha.update(&bytes);
                    self.bytes += bytes.len() as u64;
                    opener.push(&bytes)
                }
                None => self.opener.take().expect("it is there").end().map(|()| Vec::new()),
            };
            self.opened = opened.map_err(|reason| self.store.damaged(&self.name, reason))?.into_iter();
        }
    }

    /// Of the object, as far as it was read.
    pub(super) fn read_so_far(self) -> (u64, [u8; 32]) {
        (self.bytes, self.sha.finalize().into())
    }
}
