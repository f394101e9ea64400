//! The file of `auth.bootstrap`: its form, and what it comes to.
//!
//! Invariant: what is read is sound, so that carrying it out can fail for nothing but the state: names are there and there once, root is
//! among the users and has its role, ranges are none that is empty, passwords are ones that can be hashed.
//! Absent: hashes (`secure::password`), and when it is carried out (the parent).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::Bytes;
use crate::env::Disk;
use crate::identity::read_bounded;
use crate::pb::admin::RoleQuota;
use crate::pb::authpb::{Permission, permission::Type};
use crate::pb::log::auth_declare::Role;
use crate::secure::password::{self, Passwords};

/// A declaration is one command, which must be a request's size.
const FILE_BYTES_MAX: usize = 512 << 10;
const PASSWORD_FILE_BYTES_MAX: usize = 4 << 10;
/// The role that may do everything, and the user that must have it.
const ROOT: &str = "root";

/// What the file declares.
pub(super) struct Declaration {
    /// Stands for the file and those that it names; never 0.
    pub(super) mark: u64,
    pub(super) roles: Vec<Role>,
    pub(super) users: Vec<User>,
}

pub(super) struct User {
    pub(super) name: String,
    pub(super) password: Password,
    pub(super) roles: Vec<String>,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Password {
    /// The user never has one.
    None,
    Plain(String),
    /// bcrypt's text form.
    Hashed(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    roles: Vec<FileRole>,
    #[serde(default)]
    users: Vec<FileUser>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRole {
    name: String,
    #[serde(default)]
    permissions: Vec<FilePermission>,
    quota: Option<FileQuota>,
}

/// What is left out has no bound.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileQuota {
    bytes: Option<Bytes>,
    keys: Option<u64>,
    requests_per_second: Option<u64>,
}

/// One key, all from a key to an end, all that begin with a prefix, or all from a key on.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePermission {
    access: Access,
    key: Option<String>,
    range_end: Option<String>,
    prefix: Option<String>,
    from_key: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Access {
    Read,
    Write,
    Readwrite,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileUser {
    name: String,
    password: Option<String>,
    /// Its first line; below the directory of the file if the path is relative.
    password_file: Option<PathBuf>,
    password_hash: Option<String>,
    #[serde(default)]
    no_password: bool,
    #[serde(default)]
    roles: Vec<String>,
}

impl Declaration {
    /// Reads the file, or says what is wrong with it.
    pub(super) fn read(disk: &dyn Disk, path: &Path) -> Result<Self, String> {
        let unreadable = |path: &Path, error: &dyn std::fmt::Display| {
            format!("{} cannot be read: {error}; expected a file that this process may read", path.display())
        };
        let bytes = read_bounded(disk, path, FILE_BYTES_MAX).map_err(|error| unreadable(path, &error))?;
        let text = String::from_utf8(bytes).map_err(|_| format!("{} is no text, expected TOML", path.display()))?;
        let file: File =
            toml::from_str(&text).map_err(|error| format!("{} is not valid: {}", path.display(), error.message()))?;
        let dir = path.parent().unwrap_or(Path::new(""));
        let mut marked = text.into_bytes();
        let mut first_line = |name: &Path| {
            let path = dir.join(name);
            let bytes =
                read_bounded(disk, &path, PASSWORD_FILE_BYTES_MAX).map_err(|error| unreadable(&path, &error))?;
            let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
            marked.push(0);
            marked.extend(&line);
            String::from_utf8(line).map_err(|_| format!("{} begins with no text, expected a password", path.display()))
        };
        let users = file.users.into_iter().map(|user| user.sound(&mut first_line)).collect::<Result<Vec<_>, _>>()?;
        let roles = file.roles.into_iter().map(FileRole::sound).collect::<Result<Vec<_>, _>>()?;
        let declaration = Self { mark: password::mark_of(&marked), roles, users };
        declaration.check().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(declaration)
    }

    fn check(&self) -> Result<(), String> {
        for (what, names) in [
            ("user", self.users.iter().map(|user| &user.name).collect::<Vec<_>>()),
            ("role", self.roles.iter().map(|role| &role.name).collect()),
        ] {
            let mut seen = BTreeSet::new();
            if let Some(twice) = names.into_iter().find(|name| !seen.insert(*name)) {
                return Err(format!("{what} {twice:?} is there twice; leave one of them out"));
            }
        }
        let root = self.users.iter().find(|user| user.name == ROOT);
        if !root.is_some_and(|root| root.roles.iter().any(|role| role == ROOT)) {
            return Err(
                "no user root with role root, whom authentication needs; add one, with no_password if it has a \
                        certificate"
                    .into(),
            );
        }
        Ok(())
    }
}

impl FileRole {
    fn sound(self) -> Result<Role, String> {
        let Self { name, permissions, quota } = self;
        if name.is_empty() || name == ROOT {
            return Err(format!("role {name:?}: expected a name, and not root, which may do everything"));
        }
        let permissions = permissions.into_iter().map(FilePermission::sound).collect::<Result<_, _>>();
        let quota = quota.map(|quota| RoleQuota {
            bytes: quota.bytes.map_or(0, |bytes| bytes.0),
            keys: quota.keys.unwrap_or(0),
            requests_per_second: quota.requests_per_second.unwrap_or(0),
        });
        Ok(Role { quota, permissions: permissions.map_err(|error| format!("role {name:?}: {error}"))?, name })
    }
}

impl FilePermission {
    fn sound(self) -> Result<Permission, String> {
        let perm_type = match self.access {
            Access::Read => Type::Read,
            Access::Write => Type::Write,
            Access::Readwrite => Type::Readwrite,
        };
        let (key, range_end) = match (self.key, self.range_end, self.prefix, self.from_key) {
            (Some(key), end, None, None) => (key.into_bytes(), end.unwrap_or_default().into_bytes()),
            (None, None, Some(prefix), None) => (prefix.clone().into_bytes(), prefix_end(prefix.as_bytes())),
            (None, None, None, Some(key)) => (key.into_bytes(), vec![0]),
            _ => return Err("a permission is for one of key (with or without range_end), prefix, from_key".into()),
        };
        // No key is empty: the least one stands for "from the beginning".
        let key = if key.is_empty() && range_end == [0] { vec![0] } else { key };
        let is_range = !key.is_empty() && (range_end.is_empty() || key < range_end || range_end == [0]);
        if !is_range {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            return Err(format!(
                "a permission for keys from {:?} to {:?}, which are none; expected a key, and an end that is above it",
                text(&key),
                text(&range_end)
            ));
        }
        Ok(Permission { perm_type: perm_type.into(), key: key.into(), range_end: range_end.into() })
    }
}

impl FileUser {
    fn sound(self, first_line: &mut impl FnMut(&Path) -> Result<String, String>) -> Result<User, String> {
        let Self { name, password, password_file, password_hash, no_password, roles } = self;
        let about = |error: String| format!("user {name:?}: {error}");
        if name.is_empty() {
            return Err(about("expected a name".into()));
        }
        let password = match (password, password_file, password_hash, no_password) {
            (Some(password), None, None, false) => Password::Plain(password),
            (None, Some(file), None, false) => Password::Plain(first_line(&file).map_err(about)?),
            (None, None, Some(hash), false) if Passwords::is_hash(hash.as_bytes()) => Password::Hashed(hash),
            (None, None, Some(_), false) => {
                return Err(about("password_hash is none, expected the text of a bcrypt hash ($2a$10$...)".into()));
            }
            (None, None, None, true) => Password::None,
            _ => {
                let one_of = "expected one of password, password_file, password_hash, and no_password = true";
                return Err(about(one_of.into()));
            }
        };
        if let Password::Plain(plain) = &password
            && !(1..=password::PASSWORD_BYTES_MAX).contains(&plain.len())
        {
            let expected = format!("expected a password of 1 to {} bytes", password::PASSWORD_BYTES_MAX);
            return Err(about(expected));
        }
        Ok(User { name, password, roles })
    }
}

/// The first key after all that begin with `prefix`; "\0", the end of all keys, if there is none.
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff);
    last.map_or_else(|| vec![0], |last| [&prefix[..last], &[prefix[last] + 1]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Env;

    const ROOT_USER: &str = "[[users]]\nname = \"root\"\nroles = [\"root\"]\nno_password = true\n";

    fn read(text: &str) -> Result<Declaration, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("users.toml"), text).unwrap();
        std::fs::write(dir.path().join("secret"), "from a file\r\nnot this").unwrap();
        Declaration::read(&*Env::real().disk, &dir.path().join("users.toml"))
    }

    #[test]
    fn users_roles_and_all_kinds_of_ranges_are_read() {
        let declared = read(
            r#"
            [[roles]]
            name = "app"
            quota = { bytes = "64MiB", requests_per_second = 5 }
            permissions = [
                { access = "read", key = "k" },
                { access = "write", key = "a", range_end = "b" },
                { access = "readwrite", prefix = "app/" },
                { access = "read", from_key = "z" },
                { access = "read", prefix = "" },
            ]
            [[users]]
            name = "root"
            roles = ["root"]
            password_file = "secret"
            [[users]]
            name = "app"
            roles = ["app"]
            password_hash = "$2a$10$XajjQvNhvvRt5GSeFk1xFeyqRrsxkhBkUiQeg0dt.wU1qD4aFDcga"
            [[users]]
            name = "pod"
            no_password = true
            "#,
        );
        let declared = declared.unwrap();
        let ranges: Vec<(i32, &[u8], &[u8])> =
            declared.roles[0].permissions.iter().map(|p| (p.perm_type, &p.key[..], &p.range_end[..])).collect();
        let expected: [(i32, &[u8], &[u8]); 5] =
            [(0, b"k", b""), (1, b"a", b"b"), (2, b"app/", b"app0"), (0, b"z", b"\0"), (0, b"\0", b"\0")];
        assert_eq!(ranges, expected);
        let quota = RoleQuota { bytes: 64 << 20, keys: 0, requests_per_second: 5 };
        assert_eq!(declared.roles[0].quota, Some(quota));
        assert!(declared.users[0].password == Password::Plain("from a file".into()));
        assert!(matches!(declared.users[1].password, Password::Hashed(_)));
        assert!(declared.users[2].password == Password::None && declared.mark != 0);
    }

    #[test]
    fn the_mark_stands_for_all_that_is_read() {
        let mark = |text: &str| read(text).unwrap().mark;
        assert_eq!(mark(ROOT_USER), mark(ROOT_USER));
        assert_ne!(mark(ROOT_USER), mark(&format!("{ROOT_USER}\n")));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users.toml");
        std::fs::write(&path, ROOT_USER.replace("no_password = true", "password_file = \"secret\"")).unwrap();
        let marks = ["one", "other"].map(|password| {
            std::fs::write(dir.path().join("secret"), password).unwrap();
            Declaration::read(&*Env::real().disk, &path).unwrap().mark
        });
        assert_ne!(marks[0], marks[1]);
    }

    #[test]
    fn what_cannot_be_carried_out_is_refused_with_its_place() {
        let user = |lines: &str| format!("{ROOT_USER}[[users]]\n{lines}");
        let role = |lines: &str| format!("{ROOT_USER}[[roles]]\nname = \"r\"\n{lines}");
        for (text, expected) in [
            (String::new(), "no user root with role root"),
            (ROOT_USER.replace("\"root\"]", "\"r\"]"), "no user root with role root"),
            (format!("{ROOT_USER}{ROOT_USER}"), "user \"root\" is there twice"),
            (format!("{}[[roles]]\nname = \"r\"\n", role("")), "role \"r\" is there twice"),
            (user("name = \"\"\nno_password = true"), "user \"\": expected a name"),
            (user("name = \"u\""), "user \"u\": expected one of password"),
            (user("name = \"u\"\nno_password = true\npassword = \"p\""), "user \"u\": expected one of password"),
            (user("name = \"u\"\npassword = \"\""), "user \"u\": expected a password of 1 to 72 bytes"),
            (user("name = \"u\"\npassword_hash = \"x\""), "password_hash is none"),
            (user("name = \"u\"\npassword_file = \"gone\""), "gone cannot be read"),
            (user("name = \"u\"\ncolour = 1"), "colour"),
            (role("permissions = [{ access = \"own\", key = \"k\" }]"), "own"),
            (role("permissions = [{ access = \"read\" }]"), "role \"r\": a permission is for one of key"),
            (role("permissions = [{ access = \"read\", key = \"a\", prefix = \"b\" }]"), "one of key"),
            (role("permissions = [{ access = \"read\", key = \"b\", range_end = \"a\" }]"), "from \"b\" to \"a\""),
            (role("permissions = [{ access = \"read\", key = \"\" }]"), "which are none"),
            (format!("{ROOT_USER}[[roles]]\nname = \"root\""), "not root"),
            ("[[users".to_owned(), "is not valid"),
        ] {
            let Err(error) = read(&text) else { panic!("{text} is taken") };
            assert!(error.contains(expected) && error.contains("users.toml") || error.contains(expected), "{error}");
        }
    }
}
