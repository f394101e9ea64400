//! Reads the sources and lays them over each other, remembering where each value came from.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use config::{ConfigError, Map, Source, Value, ValueKind};

use super::{Config, Error, Identity};
use crate::env::Disk;
use crate::identity::read_small;

/// Read if it is there and `--config` names no other.
pub const DEFAULT_FILE: &str = "/etc/quorate/quorate.toml";

/// Begins the name of every variable that is ours.
const ENV_PREFIX: &str = "QUORATE_";
/// Stands between section and key. Kubernetes makes variables such as `QUORATE_SERVICE_HOST` and `QUORATE_PORT` for a
/// Service named quorate; they have none, and are not ours.
const ENV_SEPARATOR: &str = "__";

/// One setting given on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// `section.key`.
    pub key: String,
    pub value: String,
    /// As the user wrote it, for messages: `--size`, or `--set`.
    pub flag: String,
}

/// The file that settings are read from.
#[derive(Clone, Debug, Default)]
pub enum File {
    /// [`DEFAULT_FILE`], if it exists.
    #[default]
    Default,
    /// `--config`; it must exist.
    Named(PathBuf),
    /// None, whatever exists.
    None,
}

/// What a configuration is read from, beside the defaults.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    pub file: File,
    /// The environment. Variables that are empty count as not set: manifests often pass an optional value so.
    pub env: BTreeMap<String, String>,
    /// A later one wins.
    pub flags: Vec<Flag>,
}

/// A valid configuration, and where its values came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// By `section.key`; a key that is absent has its default.
    pub origins: BTreeMap<String, String>,
    /// What was probably meant as a setting and is none: a line each.
    pub mistakes: Vec<String>,
}

/// Reads the sources and checks the result.
pub fn load(disk: &dyn Disk, sources: &Sources) -> Result<Loaded, Error> {
    let mut builder = config::Config::builder().add_source(Layer(defaults()));
    let file = match &sources.file {
        File::Default => file_layer(disk, None)?,
        File::Named(path) => file_layer(disk, Some(path))?,
        File::None => None,
    };
    for layer in file.into_iter().chain([env_layer(&sources.env), flag_layer(&sources.flags)]) {
        check_keys(&layer)?;
        builder = builder.add_source(layer);
    }
    let merged = builder.build().map_err(|error| Error::Invalid(vec![reason(&error)]))?;
    let leaves = leaves(&merged.cache);
    check_values(&leaves)?;
    let config: Config = merged.try_deserialize().map_err(|error| Error::Invalid(vec![reason(&error)]))?;
    config.validate()?;
    let origins = leaves.into_iter().filter_map(|(key, value)| Some((key, value.origin()?.to_owned()))).collect();
    Ok(Loaded { config, origins, mistakes: mistakes(&sources.env) })
}

/// Variables that would be settings if they had two underscores. They are no errors: the environment is not ours alone.
fn mistakes(env: &BTreeMap<String, String>) -> Vec<String> {
    let meant = known_keys().into_iter().filter_map(|key| {
        let (section, key) = key.split_once('.')?;
        let name = |separator: &str| format!("{ENV_PREFIX}{section}{separator}{key}").to_uppercase();
        let (found, right) = (name("_"), name(ENV_SEPARATOR));
        env.get(&found).is_some_and(|text| !text.is_empty()).then(|| {
            format!("{found} in the environment is no setting and has no effect; {right} is, with two underscores between section and key")
        })
    });
    meant.collect()
}

impl Loaded {
    /// The effective settings as TOML, each with its source.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (section, keys) in table(&self.config) {
            let _ = writeln!(text, "{}[{section}]", if text.is_empty() { "" } else { "\n" });
            for (key, value) in keys.as_table().into_iter().flatten() {
                let origin = self.origins.get(&format!("{section}.{key}")).map_or("default", String::as_str);
                let _ = writeln!(text, "{key} = {value}  # {origin}");
            }
        }
        text
    }

    /// The same as an object: by section and key, value and source.
    pub fn json(&self) -> serde_json::Value {
        let mut object = serde_json::Map::new();
        for (section, keys) in table(&self.config) {
            let keys = keys.as_table().into_iter().flatten().map(|(key, value)| {
                let origin = self.origins.get(&format!("{section}.{key}")).map_or("default", String::as_str);
                (key.clone(), serde_json::json!({ "value": value, "from": origin }))
            });
            let keys = serde_json::Value::Object(keys.collect());
            object.insert(section, keys);
        }
        object.into()
    }
}

impl Config {
    /// The settings as TOML, for others to read: what is secret in them is left out.
    pub fn text_without_secrets(&self) -> String {
        let mut shown = self.clone();
        if !shown.cluster.token.is_empty() {
            shown.cluster.token = "(left out)".into();
        }
        Loaded { config: shown, origins: Default::default(), mistakes: Vec::new() }
            .describe()
            .replace("  # default", "")
    }
}

/// One source's values, each with its origin.
#[derive(Clone, Debug)]
struct Layer(Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

fn table(config: &Config) -> toml::Table {
    toml::Table::try_from(config).expect("every setting has a form in TOML")
}

fn defaults() -> Map<String, Value> {
    values(table(&Config::default()), None)
}

fn file_layer(disk: &dyn Disk, named: Option<&Path>) -> Result<Option<Layer>, Error> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    if named.is_none() && !disk.exists(path) {
        return Ok(None);
    }
    let origin = path.display().to_string();
    let bytes = read_small(disk, path).map_err(|fault| Error::File { path: origin.clone(), fault })?;
    let parsed = std::str::from_utf8(&bytes).map_err(|error| error.to_string()).and_then(|text| {
        toml::from_str::<toml::Table>(text).map_err(|error| {
            let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
            let at = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            format!("{at}{}", error.message().replace('\n', ", "))
        })
    });
    match parsed {
        Ok(table) => Ok(Some(Layer(values(table, Some(&origin))))),
        Err(detail) => Err(Error::Syntax { origin, detail }),
    }
}

fn values(table: toml::Table, origin: Option<&String>) -> Map<String, Value> {
    table.into_iter().map(|(key, inner)| (key, value(inner, origin))).collect()
}

fn value(from: toml::Value, origin: Option<&String>) -> Value {
    let kind = match from {
        toml::Value::String(text) => ValueKind::String(text),
        toml::Value::Integer(number) => ValueKind::I64(number),
        toml::Value::Float(number) => ValueKind::Float(number),
        toml::Value::Boolean(truth) => ValueKind::Boolean(truth),
        toml::Value::Datetime(time) => ValueKind::String(time.to_string()),
        toml::Value::Array(list) => ValueKind::Array(list.into_iter().map(|inner| value(inner, origin)).collect()),
        toml::Value::Table(inner) => ValueKind::Table(values(inner, origin)),
    };
    Value::new(origin, kind)
}

fn env_layer(env: &BTreeMap<String, String>) -> Layer {
    let ours = env.iter().filter(|(_, text)| !text.is_empty()).filter_map(|(name, text)| {
        let (section, key) = name.strip_prefix(ENV_PREFIX)?.split_once(ENV_SEPARATOR)?;
        let path = format!("{section}.{key}").to_lowercase();
        Some((path, Value::new(Some(name), text.as_str())))
    });
    Layer(ours.collect())
}

fn flag_layer(flags: &[Flag]) -> Layer {
    let values = flags.iter().map(|flag| (flag.key.clone(), Value::new(Some(&flag.flag), flag.value.as_str())));
    Layer(values.collect())
}

/// All values that are no tables, by their path; and tables that are empty, which may be misspelt sections.
fn leaves(root: &Value) -> BTreeMap<String, Value> {
    fn walk(path: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
        match &value.kind {
            ValueKind::Table(table) if !table.is_empty() || path.is_empty() => {
                for (key, inner) in table {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(&path, inner, into);
                }
            }
            _ => {
                into.insert(path.to_owned(), value.clone());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk("", root, &mut found);
    found
}

/// Every `section.key` there is.
pub(super) fn known_keys() -> Vec<String> {
    // A setting that is None has no form in TOML, so each is given a value here.
    let all = Config { identity: Identity { slot: Some(0), ..Identity::default() }, ..Config::default() };
    let root = Value::new(None, ValueKind::Table(values(table(&all), None)));
    leaves(&root).into_keys().collect()
}

fn check_keys(layer: &Layer) -> Result<(), Error> {
    let known = known_keys();
    // The paths of flags and variables are leaves already.
    let leaves = leaves(&Value::new(None, ValueKind::Table(layer.0.clone())));
    match leaves.iter().find(|(key, value)| !known.contains(key) && !is_empty_section(key, value, &known)) {
        None => Ok(()),
        Some((key, value)) => Err(Error::UnknownKey {
            key: key.clone(),
            origin: value.origin().unwrap_or("default").to_owned(),
            nearest: nearest(key, &known),
        }),
    }
}

fn is_empty_section(key: &str, value: &Value, known: &[String]) -> bool {
    matches!(value.kind, ValueKind::Table(_)) && known.iter().any(|known| section(known) == key)
}

fn section(key: &str) -> &str {
    key.split('.').next().unwrap_or_default()
}

/// The key or section that was probably meant: the same name in another section, else the most similar one.
fn nearest(key: &str, known: &[String]) -> Option<String> {
    const LEAST_SIMILARITY: f64 = 0.8;
    let name = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    if let Some(elsewhere) = known.iter().find(|known| name(known) == name(key)) {
        return Some(elsewhere.clone());
    }
    let is_key = key.contains('.');
    let candidates = known.iter().map(|known| if is_key { known } else { section(known) });
    let (similarity, best) = candidates
        .map(|candidate| (strsim::jaro_winkler(key, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))?;
    let best = if is_key { best.to_owned() } else { format!("the section [{best}]") };
    (similarity >= LEAST_SIMILARITY).then_some(best)
}

/// Reads each given value alone, over the defaults: so a message can name the key and its source, whatever is wrong.
fn check_values(leaves: &BTreeMap<String, Value>) -> Result<(), Error> {
    for (path, value) in leaves {
        let (Some(origin), Some((section, key))) = (value.origin(), path.split_once('.')) else { continue };
        let keys = Map::from_iter([(key.to_owned(), value.clone())]);
        let root = Map::from_iter([(section.to_owned(), Value::new(None, ValueKind::Table(keys)))]);
        if let Err(error) = Value::new(None, ValueKind::Table(root)).try_deserialize::<Config>() {
            return Err(Error::Value { key: path.clone(), origin: origin.to_owned(), detail: reason(&error) });
        }
    }
    Ok(())
}

/// What is wrong, without the key and the origin, which the caller knows better.
fn reason(error: &ConfigError) -> String {
    match error {
        ConfigError::At { error, .. } => reason(error),
        ConfigError::Type { unexpected, expected, .. } => format!("got {unexpected}, expected {expected}"),
        ConfigError::Message(text) => text.clone(),
        other => other.to_string(),
    }
}
