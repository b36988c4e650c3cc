use super::Check;
use crate::{JobSpec, LoraSpec, Problem};

/// Every name of a linear layer that some architecture has.
const LINEAR: [&str; 9] =
    ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"];
/// What PEFT can adapt and is frozen here.
const FROZEN: [&str; 2] = ["embed_tokens", "lm_head"];

impl Check {
    pub(super) fn lora(&mut self, spec: &JobSpec) {
        let Some(LoraSpec { rank, alpha, targets, path, .. }) = &spec.model.lora else { return };
        self.range("model.lora.rank", *rank, 1..=512);
        self.above_zero("model.lora.alpha", *alpha, 4096.0);
        if let Some(targets) = targets {
            self.that(!targets.is_empty(), "model.lora.targets", "[]", "expected at least one linear layer", &[]);
            for (place, target) in targets.iter().enumerate() {
                let named = targets[..place].contains(target);
                self.text("model.lora.targets", target, !named, "is named twice");
                let is_frozen = FROZEN.contains(&target.as_str());
                let message =
                    "adapters of embedding and head are not supported: name linear layers of the trunk, as in `q_proj`";
                self.text("model.lora.targets", target, !is_frozen, message);
                let message =
                    "expected a name of a linear layer, the last part of its tensor's, as in `q_proj` or `down_proj`";
                self.text("model.lora.targets", target, is_frozen || LINEAR.contains(&target.as_str()), message);
            }
        }
        if let Some(path) = path {
            let shown = path.display().to_string();
            self.text("model.lora.path", &shown, !shown.is_empty(), "expected the folder of an adapter");
        }
        if spec.evaluation.only {
            let message = "nothing is trained with `evaluation.only`: evaluate the merged model that a run exports, \
                           `checkpoints/…/model`";
            self.fail(Problem::new("model.lora", message), &["evaluation.only"]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::{LORA_LEARNING_RATE, parse};

    const JOB: &str = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n";

    fn problem(lora: &str) -> String {
        parse(&format!("{JOB}{lora}"), Path::new("a.toml")).map_or_else(|errors| errors.to_string(), |_| String::new())
    }

    #[test]
    fn defaults_and_the_learning_rate() {
        let job = |text: &str| parse(&format!("{JOB}{text}"), Path::new("a.toml")).expect("a job");
        assert_eq!(job("").optimizer.learning_rate, 1e-6);
        let adapted = job("[model.lora]\n");
        assert_eq!(adapted.optimizer.learning_rate, LORA_LEARNING_RATE);
        let lora = adapted.model.lora.clone().expect("adapters");
        assert_eq!((lora.rank, lora.alpha, lora.rslora, lora.targets.clone()), (16, 32.0, false, None));
        assert_eq!(job("optimizer.learning_rate = 1e-6\n[model.lora]\n").optimizer.learning_rate, 1e-6, "as written");
        // What a run writes down is read back as the same.
        assert_eq!(parse(&adapted.resolved_toml(), Path::new("b.toml")).expect("a job"), adapted);
    }

    #[test]
    fn bounds_and_what_is_not_supported() {
        for (lora, words) in [
            ("model.lora.rank = 0", "model.lora.rank"),
            ("model.lora.rank = 513", "512"),
            ("model.lora.alpha = 0.0", "above 0"),
            ("model.lora.alpha = 5000.0", "4096"),
            ("model.lora.targets = []", "at least one linear layer"),
            ("model.lora.targets = ['q_proj', 'q_proj']", "named twice"),
            ("model.lora.targets = ['lm_head']", "embedding and head are not supported"),
            ("model.lora.targets = ['embed_tokens']", "embedding and head are not supported"),
            ("model.lora.targets = ['query']", "expected a name of a linear layer"),
            ("model.lora.path = ''", "folder of an adapter"),
            ("model.lora.dropout = 0.1", "unknown key"),
        ] {
            let found = problem(lora);
            assert!(found.contains(words), "{lora}: {found}");
        }
        for lora in
            ["rank = 1", "rank = 512", "alpha = 4096.0", "targets = ['qkv_proj']", "rslora = true", "path = 'a'"]
        {
            assert_eq!(problem(&format!("model.lora.{lora}")), "", "{lora}");
        }
    }

    #[test]
    fn an_evaluation_alone_trains_no_adapters() {
        let found = problem("model.lora.rank = 8\nevaluation.only = true\n");
        assert!(found.contains("model.lora") && found.contains("merged model"), "{found}");
    }
}
