//! `pacs-worker sft`: supervised fine-tuning on given answers.

mod rows;
mod writing;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use pacs_data::TrainOrder;
use pacs_learner::{FineTuner, FineTunerSettings, Text};
use pacs_model::{Lora, ModelConfig, Parameters};
use pacs_runtime::Exit;
use pacs_spec::{JobSpec, OptimizerSpec, Schedule};
use pacs_text::Message;
use serde_json::json;

use crate::Failure;
use crate::compute::Compute;
use crate::prompting::Prompting;
use writing::Writer;

/// Data, model and hyperparameters of fine-tuning.
#[derive(Debug, Args)]
#[command(
    long_about = "Fine-tunes a model on written answers, or trains a small one from scratch.\n\nRows of the data are JSON \
                  lines {\"question\", \"answer\"}, {\"prompt\", \"response\"}, or {\"messages\": [{\"role\", \
                  \"content\"}, …]}. They are written down by the model's chat template (without one: prompt and answer as \
                  they are, and an end token); the loss is the mean cross entropy of the tokens of the answers. Progress \
                  is printed as JSON lines; the result is a Hugging Face folder.\n\nWith --job the rows are the problems of \
                  the job's [data], each with a response that its task takes for right, written as its rollouts are asked: \
                  a cold start of a model that could not be trained by rewards, because it never earns one. Names of the hub in \
                  the job are fetched, as `pacs run` does.",
    after_help = "Examples:\n  pacs-worker sft --model models/smollm2-135m-instruct --data answers.jsonl --eval held-out.jsonl \\\n      \
                  --out models/tuned --learning-rate 2e-5 --epochs 2\n  \
                  pacs-worker sft --shape tiny.json --tokenizer models/digits --data sums.jsonl --out models/tiny \\\n      \
                  --learning-rate 1e-3 --warmup-updates 50 --batch 256 --updates 300\n  \
                  pacs-worker sft --model models/blank --job deploy/studies/jobs/addition.toml --out models/addition \\\n      \
                  --learning-rate 1e-3 --batch 64 --updates 2000 --eval-every 20 --until-probability 0.15\n  \
                  pacs-worker sft --job job.toml --out models/cold-start      (from the job's own model)"
)]
pub(crate) struct Arguments {
    /// Hugging Face folder, or OWNER/NAME of the hub, to start from [default: the model of --job]
    #[arg(long, required_unless_present_any = ["shape", "job"], conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// A config.json; start from random weights of this layout.
    #[arg(long, requires = "tokenizer")]
    shape: Option<PathBuf>,
    /// Folder with the tokenizer (and chat template, if any) of a model that starts from random weights.
    #[arg(long, requires = "shape")]
    tokenizer: Option<PathBuf>,
    /// Rows to train on.
    #[arg(long, required_unless_present = "job")]
    data: Option<PathBuf>,
    /// Held-out rows for measuring the loss: before, after, and every `--eval-every` updates.
    #[arg(long)]
    eval: Option<PathBuf>,
    /// Job whose training problems are trained on, and whose held-out problems are measured.
    #[arg(long, value_name = "JOB", conflicts_with_all = ["data", "eval", "system", "prompt_suffix"])]
    job: Option<PathBuf>,
    /// Folder of the resulting model; must not exist, or be empty.
    #[arg(long)]
    out: PathBuf,
    /// Passes over the rows [default: 1]
    #[arg(long, conflicts_with = "updates", value_parser = crate::bounds::u64_to(1_000_000))]
    epochs: Option<u64>,
    /// Optimizer updates to make, instead of epochs.
    #[arg(long, value_parser = crate::bounds::u64_to(crate::bounds::MOST_TIMES))]
    updates: Option<u64>,
    /// Rows per update.
    #[arg(long, default_value_t = 32, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    batch: usize,
    /// Train adapters (LoRA) of this rank on all linear layers in place of the model; they are merged into the resulting model, and
    /// written by themselves into its folder `adapter`.
    #[arg(long, value_name = "RANK", value_parser = crate::bounds::u32_to(512))]
    lora: Option<u32>,
    /// Numerator of the adapters' scale, alpha / rank.
    #[arg(long, value_name = "ALPHA", default_value_t = 32.0, requires = "lora")]
    lora_alpha: f64,
    /// Peak learning rate [default: 1e-5, or 1e-4 with --lora]
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Updates over which the learning rate rises linearly from 0.
    #[arg(long, default_value_t = 0, value_parser = crate::bounds::u64_to(crate::bounds::MOST_TIMES))]
    warmup_updates: u64,
    /// Learning rate after warm-up, until the last update.
    #[arg(long, value_enum, default_value_t = LearningRateSchedule::Constant)]
    schedule: LearningRateSchedule,
    /// Final learning rate of `linear` and `cosine`, as a share of the learning rate.
    #[arg(long, default_value_t = 0.0)]
    final_learning_rate_ratio: f64,
    /// Decoupled weight decay, as in AdamW.
    #[arg(long, default_value_t = 0.01)]
    weight_decay: f64,
    /// Largest gradient norm, beyond which gradients are clipped; 0 disables clipping.
    #[arg(long, default_value_t = 1.0)]
    max_grad_norm: f64,
    /// Seed of the row order and of random weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Rows with more tokens are skipped and counted. Where a model has two lists of rotary factors (longrope), this decides
    /// between them for all rows, or the longest sequence of --job does.
    #[arg(long, default_value_t = 4096, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    max_tokens: usize,
    /// Token budget of one forward and backward pass; a longer row gets a pass of its own.
    #[arg(long, default_value_t = 16384, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    micro_batch_tokens: usize,
    #[command(flatten)]
    prompting: Prompting,
    /// System message of rows that have none.
    #[arg(long)]
    system: Option<String>,
    /// Text after every question or prompt.
    #[arg(long, default_value = "", hide_default_value = true)]
    prompt_suffix: String,
    /// Updates between progress lines.
    #[arg(long, default_value_t = 10, value_parser = crate::bounds::u64_to(crate::bounds::MOST_TIMES))]
    log_every: u64,
    /// Updates between measurements with `--eval`; 0: only before and after.
    #[arg(long, default_value_t = 0, value_parser = crate::bounds::u64_to(crate::bounds::MOST_TIMES))]
    eval_every: u64,
    /// End at the first measurement at which the mean probability of a whole held-out answer, sampled at temperature 1,
    /// reaches this value; if a problem has one right answer, that is the pass rate.
    #[arg(long, value_name = "SHARE")]
    until_probability: Option<f64>,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum LearningRateSchedule {
    /// It stays constant.
    Constant,
    /// It falls linearly.
    Linear,
    /// It falls along half a period of a cosine.
    Cosine,
}

impl From<LearningRateSchedule> for Schedule {
    fn from(schedule: LearningRateSchedule) -> Self {
        match schedule {
            LearningRateSchedule::Constant => Self::Constant,
            LearningRateSchedule::Linear => Self::Linear,
            LearningRateSchedule::Cosine => Self::Cosine,
        }
    }
}

pub(crate) fn run(mut arguments: Arguments) -> Result<Exit, Failure> {
    let failed = |error: anyhow::Error| Failure::config(error.context("fine-tune"));
    check(&arguments).map_err(failed)?;
    let read = |path: &Path| pacs_spec::read(path).map_err(|errors| failed(errors.into()));
    let mut job = arguments.job.as_deref().map(read).transpose()?;
    match &mut job {
        None => arguments.model = arguments.model.as_deref().map(crate::hub::model).transpose()?,
        Some(spec) if arguments.shape.is_some() => crate::hub::problems(spec)?,
        Some(spec) => {
            if let Some(model) = arguments.model.take() {
                spec.model.path = model;
            }
            crate::hub::job(spec)?;
            arguments.model = Some(spec.model.path.clone());
        }
    }
    fine_tune(&arguments, job.as_ref()).map_err(failed)?;
    Ok(Exit::Done)
}

fn fine_tune(arguments: &Arguments, job: Option<&JobSpec>) -> Result<()> {
    let (kind, device) = arguments.compute.start()?;
    let folder = folder(arguments)?;
    // A model that a job is to train computes as it will there.
    let longest = job.map_or(arguments.max_tokens, JobSpec::longest_sequence);
    let config = ModelConfig::read(&folder)?.for_sequences(longest);
    // System message and suffix are added when rows are read, so the prompter has none.
    let prompter = arguments.prompting.prompter(&folder, None, String::new())?;
    let prompter = if let Some(spec) = job { prompter.written_as(spec)? } else { prompter };
    let loader = Loader { writer: Writer::new(prompter, &config), config: &config, arguments };
    let (data, evaluation) = loader.all(job)?;
    ensure!(
        arguments.until_probability.is_none() || evaluation.is_some(),
        "`--until-probability` needs rows to measure with: `--eval`, or a job with `data.evaluation`"
    );
    let parameters = match &arguments.model {
        Some(folder) => Parameters::load(folder, &config, kind, device)?,
        None => Parameters::random(&config, kind, device, i64::try_from(arguments.seed)?),
    };
    let rows = data.len() as u64;
    let settings = settings(arguments, rows_to_learn(arguments, rows));
    let export = arguments.prompting.export(&folder)?;
    match lora(arguments) {
        None => {
            let mut tuner = FineTuner::new(&config, parameters, settings);
            train(arguments, &mut tuner, &data, evaluation.as_deref())?;
            tuner.parameters().export(&export, &arguments.out, kind)?;
        }
        Some(lora) => {
            let adapted = config.with_lora(&lora)?;
            let adapters = Parameters::fresh_adapters(&adapted, kind, device, arguments.seed);
            let mut tuner = FineTuner::adapted(&adapted, &parameters, adapters, settings);
            train(arguments, &mut tuner, &data, evaluation.as_deref())?;
            let trained = tuner.parameters();
            trained.export_merged(&adapted, &parameters, &export, &arguments.out)?;
            let base = folder.display().to_string();
            trained.save_adapters(&adapted, &base, &arguments.out.join("adapter"), kind)?;
        }
    }
    println!("{}", json!({"event": "saved", "path": arguments.out, "precision": format!("{kind:?}")}));
    Ok(())
}

/// The adapters that are trained in place of the model, where the command line asks for some.
fn lora(arguments: &Arguments) -> Option<Lora> {
    let rank = i64::from(arguments.lora?);
    Some(Lora { rank, alpha: arguments.lora_alpha, rslora: false, targets: Vec::new() })
}

/// The peak learning rate: as given, or ten times as high for adapters as for the model.
fn learning_rate(arguments: &Arguments) -> f64 {
    arguments.learning_rate.unwrap_or(if arguments.lora.is_some() { 1e-4 } else { 1e-5 })
}

fn check(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.lora != Some(0), "`--lora` is 0; expected a rank, 1 or more");
    let alpha = arguments.lora_alpha;
    ensure!(alpha > 0.0 && alpha <= 4096.0, "`--lora-alpha` is {alpha}; expected above 0, at most 4096");
    ensure!(arguments.lora.is_none() || arguments.shape.is_none(), "`--lora` needs `--model`: adapters are no model");
    ensure!(arguments.batch > 0, "`--batch` is 0; an update needs a row");
    ensure!(arguments.log_every > 0, "`--log-every` is 0; expected 1 or more");
    ensure!(arguments.epochs != Some(0) && arguments.updates != Some(0), "there is nothing to do: 0 epochs or updates");
    let rate = learning_rate(arguments);
    ensure!(rate > 0.0 && rate <= 1.0, "`--learning-rate` is {rate}; expected above 0, at most 1");
    let decay = arguments.weight_decay;
    ensure!((0.0..=1.0).contains(&decay), "`--weight-decay` is {decay}; expected 0 to 1");
    let norm = arguments.max_grad_norm;
    ensure!(norm >= 0.0 && norm.is_finite(), "`--max-grad-norm` is {norm}; expected 0 or more");
    let ratio = arguments.final_learning_rate_ratio;
    ensure!((0.0..=1.0).contains(&ratio), "`--final-learning-rate-ratio` is {ratio}; expected 0 to 1");
    let falls = arguments.schedule != LearningRateSchedule::Constant;
    ensure!(falls || ratio == 0.0, "`--final-learning-rate-ratio` applies to `--schedule` linear and cosine only");
    if let Some(share) = arguments.until_probability {
        ensure!(share > 0.0 && share < 1.0, "`--until-probability` is {share}; expected above 0, below 1");
        ensure!(arguments.eval_every > 0, "`--until-probability` looks at measurements; give `--eval-every`");
    }
    let from_job = arguments.job.is_some() && arguments.prompting.is_given();
    ensure!(!from_job, "`--chat-template` and `--template-variables` are those of `--job`");
    let out = &arguments.out;
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("`{}` is not empty; remove it or name another `--out`", out.display());
    }
    Ok(())
}

/// Folder of configuration and tokenizer; for a model from scratch it is created in `--out`.
fn folder(arguments: &Arguments) -> Result<PathBuf> {
    match (&arguments.model, &arguments.shape, &arguments.tokenizer) {
        (Some(model), _, _) => Ok(model.clone()),
        (None, Some(shape), Some(tokenizer)) => {
            // Checked before anything is written, so that an invalid file leaves no output.
            ModelConfig::read_file(shape)?;
            pacs_model::prepare_folder(shape, tokenizer, &arguments.out)?;
            Ok(arguments.out.clone())
        }
        _ => bail!("name a model to start from with `--model` or `--job`, or a shape with `--shape` and `--tokenizer`"),
    }
}

/// Rows of all updates together, repetitions included, given `rows` different ones.
fn rows_to_learn(arguments: &Arguments, rows: u64) -> u64 {
    let batch = arguments.batch as u64;
    // With epochs, the last update takes the remainder.
    arguments.updates.map_or(arguments.epochs.unwrap_or(1) * rows, |updates| updates * batch)
}

fn settings(arguments: &Arguments, rows_to_learn: u64) -> FineTunerSettings {
    FineTunerSettings {
        optimizer: OptimizerSpec {
            learning_rate: learning_rate(arguments),
            warmup_updates: arguments.warmup_updates,
            weight_decay: arguments.weight_decay,
            max_grad_norm: arguments.max_grad_norm,
            schedule: arguments.schedule.into(),
            final_learning_rate_ratio: arguments.final_learning_rate_ratio,
            ..OptimizerSpec::default()
        },
        updates: rows_to_learn.div_ceil(arguments.batch as u64),
        micro_batch_tokens: arguments.micro_batch_tokens,
    }
}

/// Reads rows and formats them for one model.
struct Loader<'a> {
    arguments: &'a Arguments,
    writer: Writer,
    config: &'a ModelConfig,
}

impl Loader<'_> {
    /// Returns the rows to train on, and those to measure with.
    fn all(&self, job: Option<&JobSpec>) -> Result<(Vec<Text>, Option<Vec<Text>>)> {
        let of_file = |path: &PathBuf| self.file(path);
        let Some(job) = job else {
            let data = self.arguments.data.as_ref().context("name rows with `--data`, or a job with `--job`")?;
            return Ok((of_file(data)?, self.arguments.eval.as_ref().map(of_file).transpose()?));
        };
        let mut data = Vec::new();
        for (path, source) in job.data.train_sets() {
            data.extend(self.texts(&path, rows::of_job(job, source)?.into_iter().map(Ok))?);
        }
        let held_out = job.data.evaluation.as_ref();
        let measured = |source| self.texts("data.evaluation", rows::of_job(job, source)?.into_iter().map(Ok));
        Ok((data, held_out.map(measured).transpose()?))
    }

    fn file(&self, path: &Path) -> Result<Vec<Text>> {
        let rows = rows::read(path, self.arguments.system.as_deref(), &self.arguments.prompt_suffix)?;
        self.texts(&path.display().to_string(), rows)
    }

    fn texts(&self, name: &str, rows: impl Iterator<Item = Result<(usize, Vec<Message>)>>) -> Result<Vec<Text>> {
        let read = || format!("read `{name}`");
        let config = self.config;
        let longest = self.arguments.max_tokens.min(config.max_positions);
        let (mut texts, mut overlong, mut count) = (Vec::new(), 0, 0);
        for row in rows {
            let (line, messages) = row.with_context(read)?;
            count += 1;
            for text in self.writer.texts(&messages).with_context(|| format!("{}, line {line}", read()))? {
                let known = |token: &u32| i64::from(*token) < config.vocab_size;
                ensure!(
                    text.tokens.iter().all(known),
                    "the tokenizer has tokens beyond the model's {}",
                    config.vocab_size
                );
                match text.tokens.len() <= longest {
                    true => texts.push(text),
                    false => overlong += 1,
                }
            }
        }
        let (targets, tokens) =
            (texts.iter().map(Text::targets).sum::<usize>(), texts.iter().map(|text| text.tokens.len()));
        let line = json!({"event": "data", "path": name, "rows": count, "texts": texts.len(), "overlong": overlong,
                          "tokens": tokens.sum::<usize>(), "learnt_tokens": targets});
        println!("{line}");
        ensure!(count > 0, "`{name}` has no rows");
        ensure!(
            !texts.is_empty(),
            "all {overlong} texts of `{name}` are longer than {longest} tokens, the least of `--max-tokens` ({}) and the model's \
             positions ({})",
            self.arguments.max_tokens,
            config.max_positions
        );
        Ok(texts)
    }
}

fn train(arguments: &Arguments, tuner: &mut FineTuner, data: &[Text], evaluation: Option<&[Text]>) -> Result<()> {
    let order = TrainOrder::new(arguments.seed, data.len(), true);
    let (rows, batch) = (data.len() as u64, arguments.batch as u64);
    let last = rows_to_learn(arguments, rows);
    let updates = last.div_ceil(batch);
    measure(tuner, 0, evaluation);
    let mut since = (Instant::now(), 0);
    for update in 1..=updates {
        let cursors = (update - 1) * batch..(update * batch).min(last);
        let texts: Vec<&Text> = cursors.map(|cursor| &data[order.index_at(cursor)]).collect();
        let report = tuner.update(&texts)?;
        ensure!(!report.skipped, "the gradient of update {update} is not finite; try a lower `--learning-rate`");
        since.1 += report.loss.tokens;
        if update % arguments.log_every == 0 || update == updates {
            let speed = since.1 as f64 / since.0.elapsed().as_secs_f64();
            let epoch = (update * batch).min(last) as f64 / rows as f64;
            let line = json!({"event": "update", "update": update, "epoch": epoch, "loss": report.loss.mean(),
                              "grad_norm": report.grad_norm, "learning_rate": report.learning_rate,
                              "tokens_per_second": speed});
            println!("{line}");
            since = (Instant::now(), 0);
        }
        let due = arguments.eval_every > 0 && update % arguments.eval_every == 0;
        if due || update == updates {
            let probability = measure(tuner, update, evaluation);
            if arguments.until_probability.zip(probability).is_some_and(|(enough, found)| found >= enough) {
                return Ok(());
            }
        }
    }
    if let Some(enough) = arguments.until_probability {
        bail!("the answers did not become as probable as {enough} within {updates} updates; give more `--updates`");
    }
    Ok(())
}

/// Prints the loss on held-out rows, and returns the mean probability of their answers.
fn measure(tuner: &FineTuner, update: u64, evaluation: Option<&[Text]>) -> Option<f64> {
    let texts = evaluation?;
    let texts: Vec<&Text> = texts.iter().collect();
    let loss = tuner.evaluate(&texts);
    println!(
        "{}",
        json!({"event": "evaluation", "update": update, "loss": loss.mean(), "learnt_tokens": loss.targets,
               "answer_probability": loss.answer_probability()})
    );
    Some(loss.answer_probability())
}
