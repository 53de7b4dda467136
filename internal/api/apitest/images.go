package apitest

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/charliek/shed"
)

// Digest returns the digest of a manifest that digit makes up.
func Digest(digit string) string { return "sha256:" + strings.Repeat(digit, 64)[:64] }

// Base is the image that a Fake has where nothing else was added.
func Base() shed.Image {
	return shed.Image{
		Ref: "base", Digest: Digest("ab"), Source: shed.SourceUser, Platform: "linux/amd64", Size: 207 << 20, CreatedAt: Created,
		Layers: []shed.Layer{{Digest: Digest("cd"), DiffID: Digest("ef"), Size: 121 << 20}},
	}
}

// AddImage adds an image.
func (f *Fake) AddImage(img shed.Image) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.images = append(f.store(), &img)
}

// Built returns the options of the last build.
func (f *Fake) Built() shed.BuildOptions {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.built
}

// store returns all images. f.mu is held.
func (f *Fake) store() []*shed.Image {
	if f.images == nil {
		img := Base()
		f.images = []*shed.Image{&img}
	}
	return f.images
}

// find returns the index of the image that name means. f.mu is held.
func (f *Fake) find(name string) (int, error) {
	digits := "sha256:" + strings.TrimPrefix(name, "sha256:")
	i := slices.IndexFunc(f.store(), func(img *shed.Image) bool {
		return name != "" && img.Ref == name || len(digits) >= len("sha256:")+12 && strings.HasPrefix(img.Digest, digits)
	})
	if i < 0 {
		return 0, shed.Errorf(shed.CodeNoImage, "there is no image %q", name).WithHint("list them: shed image ls")
	}
	return i, nil
}

func (f *Fake) get(name string) (*shed.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, err := f.find(name)
	if err != nil {
		return nil, err
	}
	c := *f.images[i]
	return &c, nil
}

func (f *Fake) put(ref, digit string) *shed.Image {
	img := Base()
	img.Ref, img.Digest = ref, Digest(digit)
	f.AddImage(img)
	return &img
}

func (f *Fake) Images(ctx context.Context) ([]*shed.Image, error) {
	if err := f.begin(ctx, "images", "", nil); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []*shed.Image
	for _, img := range f.store() {
		c := *img
		list = append(list, &c)
	}
	return list, nil
}

func (f *Fake) InspectImage(ctx context.Context, name string) (*shed.ImageDetail, error) {
	if err := f.begin(ctx, "inspect", name, nil); err != nil {
		return nil, err
	}
	img, err := f.get(name)
	if err != nil {
		return nil, err
	}
	detail := &shed.ImageDetail{
		Image: *img, MediaType: "application/vnd.oci.image.manifest.v1+json",
		Config: shed.ImageConfig{
			User: "node", WorkingDir: "/srv", Env: []string{"PATH=/bin", "A=b c"}, Entrypoint: []string{"/entry", "a b"}, Cmd: []string{"run"},
			ExposedPorts: []string{"8080/tcp"}, Labels: map[string]string{"who": "me"},
		},
	}
	for i := range img.Layers {
		detail.History = append(detail.History, shed.ImageHistory{CreatedAt: Created, CreatedBy: fmt.Sprintf("RUN step %d", i), Layer: &img.Layers[i]})
	}
	detail.History = append(detail.History, shed.ImageHistory{CreatedBy: "CMD [\"run\"]", Comment: "the end"})
	return detail, nil
}

func (f *Fake) BuildPreset(ctx context.Context, preset string, p shed.Progress) (*shed.Image, error) {
	if err := f.begin(ctx, "preset", preset, p); err != nil {
		return nil, err
	}
	if preset != "base" {
		return nil, shed.Errorf(shed.CodeInvalid, "there is no preset %q", preset)
	}
	return f.get(preset)
}

// take reads what a client sends.
func (f *Fake) take(ctx context.Context, r io.Reader, p shed.Progress) error {
	if f.Take != nil {
		return f.Take(ctx, r, p)
	}
	_, err := io.Copy(io.Discard, r)
	return err
}

func (f *Fake) Build(ctx context.Context, opts shed.BuildOptions, buildContext io.Reader, p shed.Progress) (*shed.Image, error) {
	if err := f.begin(ctx, "build", opts.Tag, p); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.built = opts
	f.mu.Unlock()
	if err := f.take(ctx, buildContext, p); err != nil {
		return nil, err
	}
	return f.put(opts.Tag, "b1"), nil
}

func (f *Fake) Pull(ctx context.Context, opts shed.PullOptions, p shed.Progress) (*shed.Image, error) {
	if err := f.begin(ctx, "pull", opts.Ref+" "+opts.Platform, p); err != nil {
		return nil, err
	}
	return f.put(opts.Ref, "b2"), nil
}

func (f *Fake) Push(ctx context.Context, opts shed.PushOptions, p shed.Progress) (*shed.Pushed, error) {
	if err := f.begin(ctx, "push", opts.Image, p); err != nil {
		return nil, err
	}
	img, err := f.get(opts.Image)
	if err != nil {
		return nil, err
	}
	if opts.To == "" {
		opts.To = img.Ref
	}
	return &shed.Pushed{Ref: opts.To, Digest: img.Digest}, nil
}

func (f *Fake) Save(ctx context.Context, names []string, w io.Writer) error {
	if err := f.begin(ctx, "save", strings.Join(names, " "), nil); err != nil {
		return err
	}
	for _, name := range names {
		if _, err := f.get(name); err != nil {
			return err
		}
	}
	if f.Archive != nil {
		return f.Archive(ctx, w)
	}
	_, err := io.WriteString(w, strings.Join(names, " "))
	return err
}

func (f *Fake) Load(ctx context.Context, archive io.Reader, p shed.Progress) ([]*shed.Image, error) {
	if err := f.begin(ctx, "load", "", p); err != nil {
		return nil, err
	}
	if err := f.take(ctx, archive, p); err != nil {
		return nil, err
	}
	return []*shed.Image{f.put("loaded", "b3")}, nil
}

func (f *Fake) Tag(ctx context.Context, name, tag string) (*shed.Image, error) {
	if err := f.begin(ctx, "tag", name, nil); err != nil {
		return nil, err
	}
	img, err := f.get(name)
	if err != nil {
		return nil, err
	}
	img.Ref = tag
	f.AddImage(*img)
	return img, nil
}

func (f *Fake) RemoveImage(ctx context.Context, name string, force bool) (*shed.Removed, error) {
	if err := f.begin(ctx, "remove", name, nil); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	i, err := f.find(name)
	if err != nil {
		return nil, err
	}
	img := f.images[i]
	if len(img.InUse) > 0 && !force {
		return nil, shed.Errorf(shed.CodeConflict, "image %q is in use by %s", name, strings.Join(img.InUse, ", ")).WithHint("delete them first")
	}
	f.images = slices.Delete(f.images, i, i+1)
	return &shed.Removed{Items: []shed.RemovedItem{{Kind: "tag", Name: img.Ref}, {Kind: "image", Name: img.Digest, Size: img.Size}}, Freed: img.Size}, nil
}

func (f *Fake) PruneImages(ctx context.Context, dryRun bool) (*shed.Removed, error) {
	if err := f.begin(ctx, "prune", "", nil); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	removed := &shed.Removed{}
	f.images = slices.DeleteFunc(slices.Clone(f.store()), func(img *shed.Image) bool {
		if img.Source != shed.SourceDangling || len(img.InUse) > 0 {
			return false
		}
		removed.Items = append(removed.Items, shed.RemovedItem{Kind: "image", Name: img.Digest, Size: img.Size})
		removed.Freed += img.Size
		return !dryRun
	})
	return removed, nil
}
