//! `[oidc]`: an issuer whose tokens show who somebody is, and what its users may do.
//!
//! Invariant: a setting that would have no effect is refused, for whoever sets it counts on it.
//! Absent: tokens and keys (`secure::oidc`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::validate::Faults;
use super::{Config, units};

/// The word that stands for the API server of the Kubernetes cluster that this member runs in.
pub const KUBERNETES: &str = "kubernetes";
const KEYS_MAX_AGE_MIN: Duration = Duration::from_secs(60);

/// `[oidc]`: tokens of an issuer, beside those that this cluster makes itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Oidc {
    /// Its URL, as its tokens name it; empty: none.
    pub issuer: String,
    /// Who the tokens must be for: one of these.
    #[serde(with = "units::list")]
    pub audiences: Vec<String>,
    /// The CAs of the issuer's server.
    pub ca_file: PathBuf,
    /// Its keys, in place of asking it for them.
    pub keys_file: PathBuf,
    /// The claim that names the user.
    pub user_claim: String,
    /// Goes before that name, so that the issuer can name none of this store's own users.
    pub user_prefix: String,
    /// Which claims give which roles; see [`RoleRule`].
    #[serde(with = "units::list")]
    pub roles: Vec<String>,
    /// So long keys are good while the issuer does not answer.
    #[serde(with = "units::duration")]
    pub keys_max_age: Duration,
}

impl Default for Oidc {
    fn default() -> Self {
        Self {
            issuer: String::new(),
            audiences: Vec::new(),
            ca_file: PathBuf::new(),
            keys_file: PathBuf::new(),
            user_claim: "sub".into(),
            user_prefix: String::new(),
            roles: Vec::new(),
            // A person has a day to bring the issuer back.
            keys_max_age: Duration::from_secs(24 * 3600),
        }
    }
}

/// `ROLE <- CLAIM=PATTERN`: whose claim is, or has in its list, what the pattern stands for, has the role. `*` stands for any text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleRule {
    pub role: String,
    pub claim: String,
    pub pattern: String,
}

impl FromStr for RoleRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once("<-").and_then(|(role, rest)| Some((role, rest.split_once('=')?)));
        let parts = parts.map(|(role, (claim, pattern))| [role, claim, pattern].map(|part| part.trim().to_owned()));
        match parts {
            Some([role, claim, pattern]) if [&role, &claim, &pattern].iter().all(|part| !part.is_empty()) => {
                Ok(Self { role, claim, pattern })
            }
            _ => Err(format!("in the place of {text:?} a rule such as \"app <- sub=system:serviceaccount:shop:*\"")),
        }
    }
}

impl fmt::Display for RoleRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} <- {}={}", self.role, self.claim, self.pattern)
    }
}

impl Oidc {
    pub fn is_on(&self) -> bool {
        !self.issuer.is_empty()
    }

    /// Which claims give which roles; an error says what is no rule.
    pub fn rules(&self) -> Result<Vec<RoleRule>, String> {
        self.roles.iter().map(|rule| rule.parse()).collect()
    }
}

impl Config {
    pub(super) fn check_oidc(&self, faults: &mut Faults) {
        let oidc = &self.oidc;
        let is_named = |path: &Path| !path.as_os_str().is_empty();
        let (issuer, of_cluster) = (&oidc.issuer, oidc.issuer == KUBERNETES);
        if !oidc.is_on() {
            let unused = oidc.audiences.is_empty()
                && oidc.roles.is_empty()
                && oidc.user_prefix.is_empty()
                && !is_named(&oidc.ca_file)
                && !is_named(&oidc.keys_file);
            let expected = "the issuer's URL, or kubernetes, for other settings of [oidc] are set";
            return faults.check(unused, "oidc.issuer", "nothing", expected, "name it, or leave them out");
        }
        let authority = issuer.strip_prefix("https://").map(|rest| rest.split('/').next().unwrap_or_default());
        let is_url = authority.is_some_and(|authority| !authority.is_empty() && !authority.contains('@'));
        // Who is not asked may have any name.
        let valid = of_cluster || is_url || is_named(&oidc.keys_file);
        let expected = "an https:// URL, the word kubernetes, or any name with oidc.keys_file";
        faults.check(valid, "oidc.issuer", format!("{issuer:?}"), expected, "correct it");
        let action = "name whom the tokens must be for: without it, one that was made for anybody would do";
        faults.check(!oidc.audiences.is_empty(), "oidc.audiences", "nothing", "at least one", action);
        let asked = !of_cluster && !is_named(&oidc.keys_file);
        let got = if is_named(&oidc.ca_file) { format!("{:?}", oidc.ca_file) } else { "nothing".into() };
        let (expected, action) = match asked {
            true => ("the path of a PEM file", "name the CAs of the issuer's server"),
            false => ("nothing, for this issuer is not asked by it", "leave it out"),
        };
        faults.check(asked == is_named(&oidc.ca_file), "oidc.ca_file", got, expected, action);
        let both = of_cluster && is_named(&oidc.keys_file);
        let expected = "nothing, for the API server is asked";
        faults.check(!both, "oidc.keys_file", format!("{:?}", oidc.keys_file), expected, "leave it out");
        faults.check(
            !oidc.user_claim.is_empty(),
            "oidc.user_claim",
            "nothing",
            "a claim's name",
            "name one, such as sub",
        );
        if let Err(error) = oidc.rules() {
            faults.check(false, "oidc.roles", oidc.roles.join(","), error, "correct it");
        }
        let age = oidc.keys_max_age;
        let got = humantime::format_duration(age);
        faults.check(age >= KEYS_MAX_AGE_MIN, "oidc.keys_max_age", got, "at least 1m", "raise it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_read_and_written() {
        let text = "app <- sub=system:serviceaccount:shop:*";
        let rule: RoleRule = text.parse().unwrap();
        assert_eq!(rule, RoleRule { role: "app".into(), claim: "sub".into(), pattern: text[11..].into() });
        assert_eq!(rule.to_string(), text);
        for none in ["", "app", "app <- sub", "<- sub=x", "app <- =x", "app <- sub=", "app = sub"] {
            assert!(none.parse::<RoleRule>().is_err(), "{none}");
        }
    }

    #[test]
    fn an_issuer_needs_its_settings_and_no_others() {
        type Change = fn(&mut Oidc);
        let sound = Oidc {
            issuer: "https://issuer.example".into(),
            audiences: vec!["quorate".into()],
            ca_file: "/ca".into(),
            ..Oidc::default()
        };
        let cases: &[(&str, Change)] = &[
            ("valid", |_| {}),
            ("valid", |o| (o.issuer, o.ca_file) = (KUBERNETES.into(), "".into())),
            ("valid", |o| (o.issuer, o.ca_file, o.keys_file) = ("me".into(), "".into(), "/keys".into())),
            ("oidc.issuer: got nothing", |o| o.issuer = String::new()),
            ("oidc.issuer: got \"http://x\"", |o| o.issuer = "http://x".into()),
            ("oidc.audiences: got nothing", |o| o.audiences.clear()),
            ("oidc.ca_file: got nothing", |o| o.ca_file = "".into()),
            ("oidc.ca_file: got \"/ca\"", |o| o.issuer = KUBERNETES.into()),
            ("oidc.keys_file: got", |o| {
                (o.issuer, o.ca_file, o.keys_file) = (KUBERNETES.into(), "".into(), "/k".into())
            }),
            ("oidc.user_claim: got nothing", |o| o.user_claim.clear()),
            ("oidc.roles: got app, expected in the place of \"app\" a rule", |o| o.roles = vec!["app".into()]),
            ("oidc.keys_max_age: got 1s", |o| o.keys_max_age = Duration::from_secs(1)),
        ];
        for (expected, change) in cases {
            let mut config = Config { oidc: sound.clone(), ..Config::default() };
            change(&mut config.oidc);
            let told = config.validate().map_or_else(|error| error.to_string(), |()| "valid".to_owned());
            assert!(told.contains(expected), "{expected}: {told}");
        }
    }
}
